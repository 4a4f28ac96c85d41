use super::*;
use proto::control::check_node_key;
use std::fs;
use std::os::unix::fs::PermissionsExt;

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

/// What loading says, as one text, the way a log prints it.
fn complaint(folder: &Path) -> String {
    let Err(error) = Identity::load_or_create(folder) else {
        panic!("an identity was loaded");
    };
    let mut text = error.to_string();
    let mut source = std::error::Error::source(&error);
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

#[test]
fn an_identity_is_made_once_and_kept_private() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state");
    assert!(!Identity::exists(&state));
    let made = Identity::load_or_create(&state).unwrap();
    let loaded = Identity::load_or_create(&state).unwrap();

    assert_eq!(made.node_key(), loaded.node_key());
    assert_eq!(made.machine_id(), loaded.machine_id());
    made.with_node_secret(|a| loaded.with_node_secret(|b| assert_eq!(a, b)));
    assert_eq!(mode(&state), 0o700);
    assert_eq!(mode(&state.join(FILE_NAME)), 0o600);
    assert_eq!(fs::read_dir(&state).unwrap().count(), 1);
}

#[test]
fn two_identities_differ() {
    let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (a, b) = (
        Identity::load_or_create(a.path()).unwrap(),
        Identity::load_or_create(b.path()).unwrap(),
    );
    assert_ne!(a.node_key(), b.node_key());
    assert_ne!(a.machine_id(), b.machine_id());
}

#[test]
fn every_flipped_bit_is_noticed_and_nothing_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    Identity::load_or_create(folder.path()).unwrap();
    let path = folder.path().join(FILE_NAME);
    let good = fs::read(&path).unwrap();
    for position in 0..good.len() {
        let mut bad = good.clone();
        bad[position] ^= 1;
        fs::write(&path, &bad).unwrap();
        assert!(
            complaint(folder.path()).contains("is damaged"),
            "{position}"
        );
        assert_eq!(fs::read(&path).unwrap(), bad);
    }
    for length in [0, 1, good.len() / 2, good.len() - 1] {
        fs::write(&path, &good[..length]).unwrap();
        assert!(complaint(folder.path()).contains("is damaged"), "{length}");
    }
    fs::write(&path, &good).unwrap();
    assert!(Identity::load_or_create(folder.path()).is_ok());
}

#[test]
fn a_file_that_others_may_read_is_refused_with_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    Identity::load_or_create(folder.path()).unwrap();
    let path = folder.path().join(FILE_NAME);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    let text = complaint(folder.path());
    assert!(
        text.contains("mode 0640") && text.contains("chmod 600"),
        "{text}"
    );
}

#[test]
fn a_complaint_never_holds_a_secret() {
    let folder = tempfile::tempdir().unwrap();
    Identity::load_or_create(folder.path()).unwrap();
    let path = folder.path().join(FILE_NAME);
    let good = fs::read_to_string(&path).unwrap();
    fs::write(&path, good.replace("check ", "chock ")).unwrap();
    let text = complaint(folder.path());
    for secret in good
        .lines()
        .flat_map(|line| line.split(' '))
        .filter(|word| word.len() > 16)
    {
        assert!(!text.contains(secret));
    }
}

#[test]
fn the_certificate_is_over_the_machine_key_and_the_proof_holds() {
    let folder = tempfile::tempdir().unwrap();
    let identity = Identity::load_or_create(folder.path()).unwrap();
    let certified = identity.client_certificate();
    certified.keys_match().unwrap();

    let challenge = NodeSecret::from_bytes([3; 32]);
    let exporter = [4; EXPORTER_BYTES];
    let proof = identity
        .prove(ChallengeKey(challenge.public().0), &exporter)
        .unwrap();
    let context = ProofContext {
        exporter: &exporter,
        machine: identity.machine_id(),
    };
    assert!(check_node_key(
        &challenge,
        identity.node_key(),
        context,
        &proof
    ));
}

#[test]
fn wiping_removes_it_and_the_next_identity_is_another() {
    let folder = tempfile::tempdir().unwrap();
    let old = Identity::load_or_create(folder.path()).unwrap();
    old.wipe().unwrap();
    assert!(!Identity::exists(folder.path()));
    old.wipe().unwrap();
    let new = Identity::load_or_create(folder.path()).unwrap();
    assert_ne!(new.machine_id(), old.machine_id());
}
