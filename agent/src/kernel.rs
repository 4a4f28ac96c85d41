//! [`Kernel`]: the hands. Reads what the kernel holds of ours and carries steps out.
//!
//! Only this module and those below it know netlink and aya: [`wireguard`] peers and keys,
//! [`route`] links, addresses, routes and forwarding, [`bpf`] programs and maps, [`underlay`] the
//! interfaces under the tunnel, [`watch`] what changes on the host, [`wake`] that it slept. They
//! decide nothing: every decision was made by the engine, and what cannot be done is an
//! [`ApplyError`] with the kernel's own words.
//!
//! A [`Kernel`] lives in a thread of its own ([`spawn`]) and takes one [`Job`] at a time, so that
//! ten thousand peers never hold up an answer on the unix socket.

pub mod bpf;
pub mod route;
pub mod underlay;
pub mod wake;
pub mod watch;
pub mod wireguard;

use bpf::guard::{self, Guard};
use engine::plan::{Acl, Device, Observed, PeerChange, Policy, Present, Step};
use engine::status::FailureKind;
use proto::key::{KEY_BYTES, NodeKey};
use route::{Link, Routes, SwitchError, Switches};
use std::collections::BTreeSet;
use std::io;
use std::path::PathBuf;
use tokio::sync::{mpsc, oneshot};
use underlay::Guarding;
use wireguard::{WireGuard, Written};

/// The oldest kernel that is supported.
pub const OLDEST_KERNEL: (u32, u32) = (6, 1);
/// Up to this many peers the device's packets are spread over the processors by `threaded`. Each
/// peer costs a kernel thread then: 5,001 of them were seen to take 128 MiB.
pub const MAX_THREADED_PEERS: usize = 512;
/// Any persistent keepalive that is not 0 sends the first packet; this one is not kept.
const GREETING_SECONDS: u16 = 25;
/// Jobs that may wait. The engine has at most one in flight; the rest are questions.
const QUEUE: usize = 16;

/// Lends the device's private key to whoever must tell it to the kernel.
pub type LendSecret = Box<dyn Fn(&mut dyn FnMut(&[u8; KEY_BYTES])) + Send>;

/// A question about the programs and their maps, which are `None` while not attached.
pub type Question = Box<dyn FnOnce(Option<&mut bpf::Acl>) + Send>;

/// What a [`Kernel`] is told once.
pub struct Config {
    /// Name of the device.
    pub interface: String,
    /// Where programs and maps are pinned.
    pub bpf_dir: PathBuf,
    /// Where it is written down what has to be put back.
    pub switches: PathBuf,
    /// Lends the device's private key.
    pub lend_secret: LendSecret,
}

/// The kernel cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// It is too old.
    #[error("this is Linux {release}; weir needs Linux 6.1 or later")]
    TooOld {
        /// What it calls itself.
        release: String,
    },
    /// No netlink.
    #[error("cannot talk with the kernel by netlink")]
    Netlink(#[from] io::Error),
}

/// The kernel cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ObserveError {
    /// Links, addresses, routes or peers.
    #[error("netlink")]
    Netlink(#[from] io::Error),
}

/// A step failed; those after it were not tried.
#[derive(Debug, thiserror::Error)]
#[error("after {done} steps")]
pub struct ApplyError {
    /// How many steps were done.
    pub done: usize,
    /// Why the next one failed.
    pub source: StepError,
}

/// Why a step failed.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// The kernel has no WireGuard.
    #[error("this kernel has no WireGuard: is its module installed?")]
    NoWireGuard,
    /// The device went away meanwhile.
    #[error("the device is gone")]
    Gone,
    /// What the kernel said.
    #[error(transparent)]
    Netlink(#[from] io::Error),
    /// Forwarding.
    #[error(transparent)]
    Switches(#[from] SwitchError),
    /// Programs and maps.
    #[error(transparent)]
    Acl(#[from] bpf::AclError),
}

/// Something for the kernel's thread to do.
pub enum Job {
    /// Carry out steps.
    Apply(Vec<Step>, oneshot::Sender<Result<(), ApplyError>>),
    /// Read what is there.
    Observe(oneshot::Sender<Result<Observed, ObserveError>>),
    /// Answer refused packets from now on, or drop them in silence.
    AnswerRefusals(bool, oneshot::Sender<Result<(), bpf::AclError>>),
    /// Guard WireGuard's port there, or nowhere.
    Guard(
        Option<Guarding>,
        oneshot::Sender<Result<guard::Report, StepError>>,
    ),
    /// Count what the guard passed and dropped.
    CountGuarded(oneshot::Sender<Result<Vec<(guard::Outcome, u64)>, bpf::AclError>>),
    /// Answer a question about the programs and their maps.
    Ask(Question),
}

/// The hands.
pub struct Kernel {
    config: Config,
    routes: Routes,
    /// Opened when first needed: only then is the module surely loaded.
    wireguard: Option<WireGuard>,
    switches: Switches,
    acl: Option<bpf::Acl>,
    guard: Guard,
    /// What the guard was told last.
    orders: Option<guard::Orders>,
    /// Whether refused packets are answered; `None` until somebody said.
    answer_refusals: Option<bool>,
    /// The policy that this process wrote into the maps.
    policy: Option<u64>,
    /// How many peers the device has, as far as is known.
    peers: usize,
    /// What this process wrote there; an earlier one may have left either.
    threaded: Option<bool>,
}

/// Starts the kernel's thread. It ends when the sender of jobs is dropped.
///
/// # Errors
/// [`OpenError`].
pub async fn spawn(config: Config) -> Result<mpsc::Sender<Job>, OpenError> {
    let (jobs, mut queue) = mpsc::channel(QUEUE);
    let (opened, answer) = oneshot::channel();
    let run = move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        let runtime = match runtime {
            Ok(runtime) => runtime,
            Err(error) => {
                let _ = opened.send(Err(error.into()));
                return;
            }
        };
        runtime.block_on(async {
            match Kernel::open(config) {
                Ok(mut kernel) => {
                    let _ = opened.send(Ok(()));
                    while let Some(job) = queue.recv().await {
                        kernel.work(job).await;
                    }
                }
                Err(error) => {
                    let _ = opened.send(Err(error));
                }
            }
        });
    };
    std::thread::Builder::new()
        .name("kernel".to_owned())
        .spawn(run)?;
    match answer.await {
        Ok(opened) => opened.map(|()| jobs),
        Err(_) => Err(io::Error::from(io::ErrorKind::BrokenPipe).into()),
    }
}

impl Kernel {
    /// Opens the kernel of the current network namespace, within a tokio runtime.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(config: Config) -> Result<Self, OpenError> {
        check_release()?;
        Ok(Self {
            routes: Routes::open()?,
            wireguard: None,
            switches: Switches::new(&config.interface, config.switches.clone()),
            acl: None,
            guard: Guard::beside(&config.bpf_dir),
            orders: None,
            answer_refusals: None,
            policy: None,
            peers: 0,
            threaded: None,
            config,
        })
    }

    /// Does one job.
    pub async fn work(&mut self, job: Job) {
        // Whoever asked may be gone; that is no error here.
        match job {
            Job::Apply(steps, reply) => {
                let _ = reply.send(self.apply(&steps).await);
            }
            Job::Observe(reply) => {
                let _ = reply.send(self.observe().await);
            }
            Job::AnswerRefusals(answer, reply) => {
                self.answer_refusals = Some(answer);
                let acl = self.acl.as_ref();
                let _ = reply.send(acl.map_or(Ok(()), |acl| acl.answer_refusals(answer)));
            }
            Job::Guard(wanted, reply) => {
                let _ = reply.send(self.guard(wanted.as_ref()).await);
            }
            Job::CountGuarded(reply) => {
                let _ = reply.send(self.guard.counters());
            }
            Job::Ask(question) => question(self.acl.as_mut()),
        }
    }

    /// What has been written to WireGuard so far.
    #[must_use]
    pub fn written(&self) -> Written {
        self.wireguard
            .as_ref()
            .map(WireGuard::written)
            .unwrap_or_default()
    }

    /// What the kernel holds of ours: one dump of the device.
    ///
    /// # Errors
    /// [`ObserveError`].
    pub async fn observe(&mut self) -> Result<Observed, ObserveError> {
        let link = self.routes.link(&self.config.interface).await?;
        let device = match link {
            None => Device::Absent,
            Some(link) if !link.wireguard => Device::Foreign,
            Some(link) => match self.observe_device(link).await {
                Ok(present) => Device::Present(present),
                Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Device::Absent,
                Err(error) => return Err(error.into()),
            },
        };
        Ok(Observed {
            acl: self.observe_acl(link),
            forwarding: self.switches.observe(),
            device,
        })
    }

    async fn observe_device(&mut self, link: Link) -> io::Result<Present> {
        let dump = self.wireguard()?.dump(link.index)?;
        self.peers = dump.peers.len();
        self.inform_guard(&dump.peers);
        Ok(Present {
            key: dump.key,
            listen_port: dump.listen_port,
            mtu: link.mtu,
            up: link.up,
            addrs: self.routes.addrs(link.index).await?,
            peers: dump.peers,
            routes: self.routes.routes(link.index).await?,
            without_v6: self.switches.is_without_v6(),
        })
    }

    /// Programs count as attached only to the device that is there now. Those that an earlier agent
    /// left there hold, whether or not we can take them over: the device stays up under them, and
    /// they are taken over when a policy is to be written.
    fn observe_acl(&mut self, link: Option<Link>) -> Acl {
        let ours = match (&self.acl, link) {
            (Some(acl), Some(link)) => acl.is_attached(link.index),
            (None, _) | (_, None) => false,
        };
        if ours {
            if let Some(Err(error)) = self.acl.as_mut().map(bpf::Acl::recount) {
                tracing::debug!(%error, "flows are not counted anew");
            }
            return Acl::Attached(self.policy);
        }
        self.acl = None;
        self.policy = None;
        let folder = &self.config.bpf_dir;
        if link.is_some_and(|link| bpf::holds(link.index, folder)) {
            Acl::Attached(None)
        } else if bpf::is_pinned(folder) {
            Acl::Pinned
        } else {
            Acl::Absent
        }
    }

    /// Carries out steps, in order, until one fails.
    ///
    /// # Errors
    /// [`ApplyError`].
    pub async fn apply(&mut self, steps: &[Step]) -> Result<(), ApplyError> {
        for (done, step) in steps.iter().enumerate() {
            tracing::debug!(%step, "step");
            let failed = |source| ApplyError { done, source };
            self.step(step).await.map_err(failed)?;
        }
        Ok(())
    }

    async fn step(&mut self, step: &Step) -> Result<(), StepError> {
        match step {
            Step::CreateLink { mtu } => self.create(*mtu).await?,
            Step::DeleteLink => self.delete().await?,
            Step::AttachAcl => self.attach().await?,
            Step::SetAcl(policy) => self.set_acl(policy).await?,
            Step::DetachAcl => self.detach()?,
            Step::Forward(forwarding) => self.switches.forward(forwarding)?,
            Step::RestoreForwarding(forwarding) => self.switches.restore(forwarding)?,
            Step::SetMtu(mtu) => self.routes.set_mtu(self.index().await?, *mtu).await?,
            Step::SetUp(up) => {
                let index = self.index().await?;
                if *up {
                    self.switches.note_redirects();
                }
                self.routes.set_up(index, *up).await?;
            }
            Step::Configure { listen_port, .. } => self.configure(*listen_port).await?,
            Step::SetPeers(changes) => {
                let index = self.index().await?;
                self.wireguard()?.set_peers(index, changes)?;
                self.peers += changes.iter().filter(|change| change.create).count();
                self.spread();
            }
            Step::RemovePeers(keys) => {
                let index = self.index().await?;
                self.wireguard()?.remove_peers(index, keys)?;
                self.peers = self.peers.saturating_sub(keys.len());
                self.spread();
            }
            Step::Greet(peers) => self.greet(peers).await?,
            Step::AddAddr(addr) => self.routes.add_addr(self.index().await?, *addr).await?,
            Step::RemoveAddr(addr, len) => {
                let index = self.index().await?;
                self.routes.remove_addr(index, *addr, *len).await?;
            }
            Step::AddRoute(prefix, mtu) => {
                let index = self.index().await?;
                self.routes.add_route(index, *prefix, *mtu).await?;
            }
            Step::ChangeRoute(prefix, mtu) => {
                let index = self.index().await?;
                self.routes.change_route(index, *prefix, *mtu).await?;
            }
            Step::RemoveRoute(prefix) => {
                let index = self.index().await?;
                self.routes.remove_route(index, *prefix).await?;
            }
        }
        Ok(())
    }

    async fn create(&mut self, mtu: u32) -> Result<(), StepError> {
        let created = self.routes.create(&self.config.interface, mtu).await;
        (self.peers, self.threaded) = (0, None);
        created.map_err(|error| match error.raw_os_error() {
            Some(libc::EOPNOTSUPP) => StepError::NoWireGuard,
            _ => error.into(),
        })
    }

    async fn delete(&mut self) -> Result<(), StepError> {
        if let Some(link) = self.routes.link(&self.config.interface).await?
            && link.wireguard
        {
            self.routes.delete(link.index).await?;
        }
        self.switches.restore_redirects()?;
        Ok(self.switches.forget_tunnel()?)
    }

    async fn attach(&mut self) -> Result<(), StepError> {
        let index = self.index().await?;
        self.acl = None;
        self.policy = None;
        let interface = &self.config.interface;
        let acl = bpf::Acl::attach_or_adopt(interface, index, &self.config.bpf_dir)?;
        if let Some(answer) = self.answer_refusals {
            acl.answer_refusals(answer)?;
        }
        self.acl = Some(acl);
        Ok(())
    }

    /// By the change alone if the maps hold the policy before; whole if nobody knows what they hold.
    async fn set_acl(&mut self, policy: &Policy) -> Result<(), StepError> {
        if self.acl.is_none() {
            self.attach().await?;
        }
        let acl = self.acl.as_mut().ok_or(StepError::Gone)?;
        let before = self.policy.take();
        let follows = before.is_some_and(|serial| serial + 1 == policy.serial);
        acl.set(&policy.tables, follows.then_some(&policy.change))?;
        self.policy = Some(policy.serial);
        Ok(())
    }

    fn detach(&mut self) -> Result<(), StepError> {
        self.acl = None;
        self.policy = None;
        Ok(bpf::detach_and_unpin(
            &self.config.interface,
            &self.config.bpf_dir,
        )?)
    }

    /// A persistent keepalive that is switched on has the kernel send an empty packet at once
    /// (`set_peer` in drivers/net/wireguard/netlink.c), which begins a handshake.
    async fn greet(&mut self, peers: &[(NodeKey, u16)]) -> Result<(), StepError> {
        let index = self.index().await?;
        let with = |keepalive: fn(u16) -> u16| -> Vec<PeerChange> {
            let change = |(key, last): &(NodeKey, u16)| PeerChange {
                key: *key,
                create: false,
                replace_allowed_ips: false,
                allowed_ips: BTreeSet::new(),
                endpoint: None,
                keepalive: Some(keepalive(*last)),
            };
            peers.iter().map(change).collect()
        };
        let wireguard = self.wireguard()?;
        if peers.iter().any(|(_, last)| *last != 0) {
            wireguard.set_peers(index, &with(|_| 0))?;
        }
        wireguard.set_peers(index, &with(|_| GREETING_SECONDS))?;
        wireguard.set_peers(index, &with(|last| last))?;
        Ok(())
    }

    async fn configure(&mut self, listen_port: u16) -> Result<(), StepError> {
        let index = self.index().await?;
        self.wireguard()?;
        let Some(wireguard) = &mut self.wireguard else {
            return Err(StepError::NoWireGuard);
        };
        let mut result = Ok(());
        (self.config.lend_secret)(&mut |secret| {
            result = wireguard.configure(index, secret, listen_port);
        });
        Ok(result?)
    }

    /// Lets the kernel decrypt on all processors, where the peers are few enough. Possible only once
    /// there is a peer. Best effort: without it packets flow as well, on one processor.
    fn spread(&mut self) {
        let wanted = are_few(self.peers);
        if self.threaded == Some(wanted) {
            return;
        }
        let file = format!("/sys/class/net/{}/threaded", self.config.interface);
        let written = std::fs::write(file, if wanted { "1" } else { "0" });
        if written.is_ok() {
            self.threaded = Some(wanted);
        }
    }

    async fn index(&self) -> Result<u32, StepError> {
        let link = self.routes.link(&self.config.interface).await?;
        let ours = link.filter(|link| link.wireguard);
        ours.map(|link| link.index).ok_or(StepError::Gone)
    }

    fn wireguard(&mut self) -> io::Result<&mut WireGuard> {
        if self.wireguard.is_none() {
            self.wireguard = Some(WireGuard::open()?);
        }
        self.wireguard
            .as_mut()
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

impl ApplyError {
    /// What kind of failure it is.
    #[must_use]
    pub fn kind(&self) -> FailureKind {
        match &self.source {
            StepError::NoWireGuard => FailureKind::Unsupported,
            StepError::Switches(SwitchError::WholeMachine) => FailureKind::ForwardingV6,
            StepError::Acl(error) => error.kind(),
            StepError::Switches(SwitchError::Io { source, .. }) | StepError::Netlink(source) => {
                match source.kind() {
                    io::ErrorKind::PermissionDenied => FailureKind::Permission,
                    io::ErrorKind::AddrInUse => FailureKind::PortTaken,
                    _ => FailureKind::Kernel,
                }
            }
            StepError::Gone => FailureKind::Kernel,
        }
    }
}

fn check_release() -> Result<(), OpenError> {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let release = release.trim().to_owned();
    if is_supported(&release) {
        Ok(())
    } else {
        Err(OpenError::TooOld { release })
    }
}

/// Whether a kernel that calls itself so is new enough.
#[must_use]
pub fn is_supported(release: &str) -> bool {
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(|digits| digits.parse().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    version >= OLDEST_KERNEL
}

/// Whether so many peers are worth a kernel thread each.
fn are_few(peers: usize) -> bool {
    (1..=MAX_THREADED_PEERS).contains(&peers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_before_6_1_are_refused() {
        for old in ["5.15.0-91-generic", "6.0.19", "4.4", "", "x"] {
            assert!(!is_supported(old), "{old}");
        }
        for new in ["6.1.0-18-amd64", "6.12.57", "7.0-rc1", "10.2"] {
            assert!(is_supported(new), "{new}");
        }
    }

    #[test]
    fn a_peer_costs_a_thread_only_where_peers_are_few() {
        let spread = [0, 1, 512, 513, 10_000].map(are_few);
        assert_eq!(spread, [false, true, true, false, false]);
    }
}
