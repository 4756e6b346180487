//! Runs over two hosts, which are network namespaces of this machine joined by a pair of virtual links: the run of one process,
//! and who is named when the link between them is cut.
//!
//! Needs a privileged user and `ip`; where the machine allows no namespaces the tests say so and pass.

use crate::mpirun::{mpirun, skipped, text};
use crate::process_runs::process_of;
use crate::runs::{done, finished, steps, wait_for};
use rustix::process::{Pid, Signal, kill_process};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Two hosts, gone when dropped.
struct Hosts {
    names: [String; 2],
    addresses: [String; 2],
    network: String,
    /// Stands in for ssh.
    agent: PathBuf,
    folder: TempDir,
}

fn ip(words: &str) -> bool {
    let ended = Command::new("ip").args(words.split(' ')).stderr(Stdio::null()).status();
    ended.is_ok_and(|status| status.success())
}

impl Hosts {
    /// Two hosts in a network of their own; `None` where the machine does not allow it.
    fn new(subnet: u8) -> Option<Hosts> {
        let name = |letter: char| format!("rh{}{letter}{subnet}", std::process::id());
        let address = |host: u8| format!("10.77.{subnet}.{host}");
        let folder = TempDir::new().unwrap();
        let hosts = Hosts {
            names: ['a', 'b'].map(name),
            addresses: [1, 2].map(address),
            network: format!("10.77.{subnet}.0/24"),
            agent: folder.path().join("agent"),
            folder,
        };
        let made = hosts.names.iter().all(|name| ip(&format!("netns add {name}")));
        if !made || !hosts.connect() {
            skipped("this machine allows no network namespaces");
            return None;
        }
        let [a, b] = &hosts.names;
        let [at_a, at_b] = &hosts.addresses;
        let script = format!(
            "#!/bin/sh\nhost=$1\nshift\ncase $host in {at_a}) name={a} ;; {at_b}) name={b} ;; *) exit 1 ;; esac\n\
             exec ip netns exec $name unshare --uts sh -c \"hostname $name; $*\"\n"
        );
        std::fs::write(&hosts.agent, script).unwrap();
        std::fs::set_permissions(&hosts.agent, std::fs::Permissions::from_mode(0o755)).unwrap();
        Some(hosts)
    }

    fn connect(&self) -> bool {
        let [a, b] = &self.names;
        let link = |name: &str| format!("{}v", name.trim_start_matches("rh"));
        let pair =
            format!("link add {} netns {a} type veth peer name {} netns {b}", link(a), link(b));
        ip(&pair)
            && self.names.iter().zip(&self.addresses).all(|(name, address)| {
                let link = link(name);
                ip(&format!("-n {name} addr add {address}/24 dev {link}"))
                    && ip(&format!("-n {name} link set {link} up"))
                    && ip(&format!("-n {name} link set lo up"))
            })
    }

    /// Cuts the link, as where a cable is drawn.
    fn cut(&self) {
        let name = &self.names[1];
        assert!(ip(&format!("-n {name} link set {}v down", name.trim_start_matches("rh"))));
    }

    /// The smoke run with seed 3, a rank on each host, led from the first.
    fn run(&self, out: &Path, settings: &[&str]) -> Command {
        let plain = mpirun(2, &[]);
        let [a, at] = [&self.names[0], &self.addresses.join(":1,")];
        let mut command = Command::new("ip");
        command.args(["netns", "exec", a, "unshare", "--uts", "sh", "-c"]);
        command.arg("hostname \"$0\"; exec \"$@\"").args([a, "mpirun"]);
        command.args(["--mca", "plm_rsh_agent"]).arg(&self.agent);
        command.args(["--mca", "btl", "tcp,self", "--mca", "btl_tcp_if_include", &self.network]);
        command.args(["--mca", "oob_tcp_if_include", &self.network, "-H", &format!("{at}:1")]);
        command.args(plain.get_args()).arg(env!("CARGO_BIN_EXE_rehearsal"));
        command.args(["run", "configs/smoke.toml", "--seed", "3", "--console", "plain", "--out"]);
        command.arg(out);
        for assignment in settings {
            command.args(["--set", assignment]);
        }
        for (name, value) in plain.get_envs() {
            command.env(name, value.unwrap_or_default());
        }
        command.current_dir(env!("CARGO_MANIFEST_DIR"));
        command
    }
}

impl Hosts {
    /// Ends whatever runs on them, all of it started here.
    fn end_all(&self) {
        for name in &self.names {
            let pids = Command::new("ip").args(["netns", "pids", name]).output();
            let pids = pids.map(|output| text(&output)).unwrap_or_default();
            let pids = pids.split_whitespace().filter_map(|pid| Pid::from_raw(pid.parse().ok()?));
            // One that is gone already is as good.
            pids.for_each(|pid| kill_process(pid, Signal::KILL).unwrap_or_default());
        }
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        self.end_all();
        for name in &self.names {
            ip(&format!("netns del {name}"));
        }
    }
}

#[test]
fn a_run_over_two_hosts_is_the_run_of_one_process() {
    let Some(hosts) = Hosts::new(1) else { return };
    let out = hosts.folder.path().join("run");
    let output = done(hosts.run(&out, &["cluster.data=2", "cluster.expert=2"]));
    let [a, b] = &hosts.names;
    assert!(text(&output).contains(&format!("2 processes on {a}, {b} over ")), "{}", text(&output));
    let losses = |run: &Path| -> Vec<f64> {
        steps(run).iter().map(|step| step["loss"].as_f64().unwrap()).collect()
    };
    let (own, expected) = (losses(&out), losses(finished()));
    assert_eq!(own.len(), expected.len());
    assert!(own.iter().zip(&expected).all(|(own, other)| (own - other).abs() < 1e-3), "{own:?}");
}

#[test]
fn a_host_that_no_longer_answers_is_named_at_the_deadline() {
    let Some(hosts) = Hosts::new(2) else { return };
    let out = hosts.folder.path().join("run");
    let settings = ["cluster.data=2", "stage.base.steps=50000", "cluster.deadline_seconds=2"];
    let mut command = hosts.run(&out, &settings);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    wait_for(&mut child, &out, "step");
    hosts.cut();
    let until = Instant::now() + Duration::from_secs(30);
    while (0..2).any(|rank| process_of(&out, rank).is_some()) {
        assert!(Instant::now() < until, "a process waits for ever");
        std::thread::sleep(Duration::from_millis(20));
    }
    // mpirun itself waits for its daemon on the other host, which hears nothing.
    hosts.end_all();
    let said = text(&child.wait_with_output().unwrap());
    for part in ["rank 0 of 2 ends: rank", "rank 1", "for 2 s; "] {
        assert!(said.contains(part), "{said}");
    }
}
