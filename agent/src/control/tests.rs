use super::*;

#[test]
fn pauses_double_are_bounded_and_differ_between_nodes() {
    let (a, b) = ([1; 32], [2; 32]);
    for failures in 0..40 {
        let pause = pause(a, failures);
        let longest = FIRST_PAUSE * 2_u32.pow(failures.min(6));
        assert!(pause <= longest.min(LONGEST_PAUSE) && pause >= longest.min(LONGEST_PAUSE) / 4);
    }
    assert_ne!(pause(a, 3), pause(b, 3));
    assert_eq!(pause(a, 3), pause(a, 3));
}
