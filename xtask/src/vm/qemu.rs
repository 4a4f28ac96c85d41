//! Stock kernels in QEMU: on real KVM, or emulated (TCG) where there is none.
//!
//! The host's root and the written-through folders come by 9p; stdout, stderr and the exit code
//! leave by ports of a virtio serial device; the kernel's log by the serial line.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::Context;
use sha2::{Digest, Sha256};

use super::guest::Folder;
use super::{Accel, Job, Machine, kernels};
use crate::{house, setup};

const QEMU: &str = "qemu-system-x86_64";
/// A guest on real KVM is up in 2 s; one that hangs will not become better.
const PROBE: Duration = Duration::from_secs(15);

/// An emulated or KVM machine with a stock kernel of the given line.
pub fn machine(accel: Accel, line: Option<&str>, icount: bool) -> anyhow::Result<Machine> {
    anyhow::ensure!(
        cfg!(target_arch = "x86_64"),
        "QEMU guests are for x86-64 hosts only"
    );
    setup::ensure(&[setup::Purpose::Qemu])?;
    let qemu = house::program(QEMU).with_context(|| format!("no {QEMU} here"))?;
    let kernel = kernels::stock(line.unwrap_or(kernels::VERSIONS[0]))?;
    let initramfs = kernels::initramfs(&kernel)?;
    Ok(Machine::Qemu {
        qemu,
        accel,
        release: kernel.release,
        image: kernel.image,
        initramfs,
        icount,
    })
}

/// Boots a guest on KVM, because the device node alone proves nothing: nested and
/// paravirtual KVMs exist that cannot run a stock kernel. The answer is kept until reboot.
pub fn probe_kvm() -> Result<Machine, String> {
    let flags = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    if !flags
        .split_whitespace()
        .any(|flag| flag == "vmx" || flag == "svm")
    {
        return Err("the processor shows no hardware virtualisation".into());
    }
    let access = rustix::fs::Access::READ_OK | rustix::fs::Access::WRITE_OK;
    if rustix::fs::access("/dev/kvm", access).is_err() {
        return Err("/dev/kvm is missing or not ours to use".into());
    }
    let words = |error: anyhow::Error| format!("{error:#}");
    let machine = machine(Accel::Kvm, None, false).map_err(words)?;
    let boot = std::fs::read("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let key: String = Sha256::digest(&boot)
        .iter()
        .take(8)
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let note = house::cache().map_err(words)?.join(format!("kvm-{key}"));
    let answer = match std::fs::read_to_string(&note) {
        Ok(answer) => answer,
        Err(_) => {
            let answer = if boots(machine.clone()).map_err(words)? {
                "yes"
            } else {
                "no"
            };
            // A lost note costs another probe, no more.
            let _ = std::fs::write(&note, answer);
            answer.to_owned()
        }
    };
    if answer == "yes" {
        Ok(machine)
    } else {
        Err("a probe boot on /dev/kvm failed".into())
    }
}

fn boots(machine: Machine) -> anyhow::Result<bool> {
    let mut job = Job::new(machine, vec!["true".into()])?;
    job.timeout = PROBE;
    Ok(job.start(Stdio::null(), Stdio::null())?.wait()? == 0)
}

/// QEMU's command line. `{in}`, `{out}` and `{err}` become descriptors at launch.
pub fn argv(job: &Job, folder: &Folder) -> Vec<String> {
    let Machine::Qemu {
        qemu,
        accel,
        image,
        initramfs,
        icount,
        ..
    } = &job.machine
    else {
        return Vec::new();
    };
    let mut argv = vec![qemu.display().to_string()];
    let mut add = |words: &str| argv.extend(words.split(' ').map(str::to_owned));
    add(match (accel, icount) {
        (Accel::Kvm, _) => "-accel kvm -cpu host",
        (Accel::Tcg, false) => "-accel tcg,thread=multi,tb-size=1024 -cpu max,-la57",
        // One thread and no idling: virtual time is then a count of instructions.
        (Accel::Tcg, true) => {
            "-accel tcg,thread=single,tb-size=1024 -cpu max,-la57 -icount shift=0,sleep=off"
        }
    });
    let cpus = if *icount { 1 } else { job.cpus };
    add(&format!("-machine q35 -smp {cpus} -m {}", job.mem_mib));
    add("-nodefaults -no-user-config -display none -no-reboot");
    add("-device virtio-rng-pci -device virtio-serial-pci");
    for (number, stream) in [(1, "out"), (2, "err")] {
        add(&format!("-add-fd fd={{{stream}}},set={number}"));
        add(&format!(
            "-chardev file,id={stream},path=/dev/fdset/{number},append=on"
        ));
        add(&format!(
            "-device virtserialport,chardev={stream},name={stream},nr={number}"
        ));
    }
    add("-device virtserialport,chardev=rc,name=rc,nr=3");
    if job.tty.is_some() {
        // Re-opens the terminal that is our stdin, for both directions.
        add("-chardev serial,id=tty,path=/proc/self/fd/{in}");
        add("-device virtconsole,chardev=tty,name=tty,nr=4");
    }
    let work = escaped(&folder.path);
    if job.beats() {
        add(&format!("-chardev file,id=beat,path={work}/io/beat"));
        add("-device virtserialport,chardev=beat,name=beat,nr=5");
    }
    let log = escaped(&folder.kernel_log());
    for (option, value) in [
        ("-chardev", format!("file,id=rc,path={work}/io/rc")),
        ("-serial", format!("file:{log}")),
        ("-kernel", image.display().to_string()),
        ("-initrd", initramfs.display().to_string()),
        ("-append", kernel_words(&folder.path)),
    ] {
        argv.extend([option.to_owned(), value]);
    }
    shares(job, &mut argv);
    argv
}

/// A path among QEMU's options, where a comma separates and a doubled one is itself.
fn escaped(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

fn shares(job: &Job, argv: &mut Vec<String>) {
    let root = (PathBuf::from("/"), "host".to_owned(), "readonly=on,");
    let rw = job.rw.iter().enumerate();
    let rw = rw.map(|(index, path)| (path.clone(), format!("rw{}", index + 1), ""));
    for (path, tag, mode) in std::iter::once(root).chain(rw) {
        let path = escaped(&path);
        argv.extend([
            "-fsdev".into(),
            format!("local,id={tag},path={path},security_model=none,{mode}multidevs=remap"),
            "-device".into(),
            format!("virtio-9p-pci,fsdev={tag},mount_tag={tag}"),
        ]);
    }
}

fn kernel_words(work: &Path) -> String {
    format!(
        "console=ttyS0 panic=-1 mitigations=off nokaslr audit=0 selinux=0 apparmor=0 \
         tsc=reliable no_timer_check cryptomgr.notests rcupdate.rcu_expedited=1 \
         random.trust_cpu=1 net.ifnames=0 VM_WORK={}",
        work.display()
    )
}
