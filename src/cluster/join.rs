//! Join: how ranks that a launcher started become a run.
//!
//! 1. Every rank tells rank 0 over the link who it is: host, process, binary, config, how many processes it was told of.
//! 2. Rank 0 compares. A rank with another binary, another config or another number is refused, by name and on every rank.
//! 3. Rank 0 makes the run's secret and number, and tells them with its addresses and everybody's names.
//! 4. Every other rank connects to rank 0 over TCP and shows that it knows the secret; rank 0 shows the same.
//!
//! Knows no config: what must be the same on all ranks is a table of texts. Every wait ends at a deadline, and rank 0 tells those
//! that did answer who did not, for which they wait somewhat longer than it.

use super::control::{Connection, Control};
use super::link::{Broken, Call, Frame, Lane, Link, Operation};
use super::stop::Stop;
use super::wire::{LONGEST_HELLO, Seal, Secret, decode, encode, read_frame, sender};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

/// How long one address may take to answer while others are left.
const ONE_ADDRESS: Duration = Duration::from_secs(3);

/// How long rank 0 waits for somebody who has connected to say who it is.
const ONE_HELLO: Duration = Duration::from_secs(5);

/// How often rank 0 looks for a connection, and others try again.
const LOOK: Duration = Duration::from_millis(5);

/// Differences that a refusal names.
const MOST_NAMED: usize = 8;

/// Who a rank is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ident {
    /// Its host's name.
    pub host: String,
    /// Its process.
    pub pid: u32,
    /// Processes that it was told of.
    pub processes: usize,
    /// Hash of its binary.
    pub binary: String,
    /// What must be the same on all ranks, by key.
    pub config: BTreeMap<String, String>,
    /// Bytes that it may hold, if anything limits them.
    pub memory: Option<u64>,
    /// Whether its processor has no instructions for products of integers.
    pub lacks_integers: bool,
}

/// A run, as each of its ranks sees it.
pub struct Joined {
    /// The control links.
    pub control: Arc<Control>,
    /// Every rank, in order: its process and its host.
    pub names: Vec<String>,
    /// Bytes that each rank may hold: the least of what they have.
    pub memory: Option<u64>,
    /// The ranks whose processors have no instructions for products of integers.
    pub lack_integers: Vec<usize>,
}

/// What rank 0 answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
enum Verdict {
    Refused(Broken),
    Taken(Terms),
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Terms {
    key: [u8; 32],
    epoch: u64,
    host: String,
    port: u16,
    addresses: Vec<Ipv4Addr>,
    names: Vec<String>,
    memory: Option<u64>,
    lack_integers: Vec<usize>,
}

/// Makes the ranks of a link a run. `silence` is what control links bear, `deadline` what joining may take.
pub fn join(
    link: &dyn Link,
    ranks: usize,
    own: &Ident,
    [deadline, silence]: [Duration; 2],
    stop: Arc<Stop>,
) -> Result<Joined, Broken> {
    let rank = link.rank();
    // The others wait for rank 0, which waits for the last of them.
    let longest = if rank == 0 { deadline } else { deadline + deadline / 4 };
    let joining = Joining { link, ranks, longest, until: Instant::now() + longest };
    let (terms, (connections, absent)) = match rank {
        0 => joining.lead(own)?,
        _ => {
            let terms = joining.follow(own)?;
            let connection = joining.connect(&terms, own)?;
            (terms, (vec![connection], None))
        }
    };
    let board = Arc::clone(link.board());
    let control = Control::new(rank, connections, silence, board, stop);
    let control = control.map_err(|error| joining.failed(format!("control links: {error}")))?;
    if let Some(absent) = absent {
        control.stop().set(&absent);
        return Err(absent);
    }
    let Terms { names, memory, lack_integers, .. } = terms;
    Ok(Joined { control, names, memory, lack_integers })
}

/// Connections with others, and who did not come if one did not.
type Seats = (Vec<Connection>, Option<Broken>);

struct Joining<'a> {
    link: &'a dyn Link,
    ranks: usize,
    longest: Duration,
    until: Instant,
}

impl Joining<'_> {
    /// Rank 0's part.
    fn lead(&self, own: &Ident) -> Result<(Terms, Seats), Broken> {
        let verdict = self.idents(own).and_then(|idents| match refusal(&idents) {
            Some(refused) => Err(refused),
            None => self.terms(&idents),
        });
        let (answer, verdict) = match verdict {
            Ok((terms, listener)) => (Verdict::Taken(terms.clone()), Ok((terms, listener))),
            Err(refused) => (Verdict::Refused(refused.clone()), Err(refused)),
        };
        for rank in 1..self.ranks {
            self.send(rank, "who is taken", &answer)?;
        }
        let (terms, listener) = verdict?;
        let connections = self.accept(&terms, &listener)?;
        Ok((terms, connections))
    }

    /// Who is there, by rank.
    fn idents(&self, own: &Ident) -> Result<Vec<Ident>, Broken> {
        let others = (1..self.ranks).map(|rank| self.receive(rank, "who is there"));
        std::iter::once(Ok(own.clone())).chain(others).collect()
    }

    /// What every other rank is to know.
    fn terms(&self, idents: &[Ident]) -> Result<(Terms, TcpListener), Broken> {
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0));
        let bound = listener.and_then(|listener| Ok((listener.local_addr()?.port(), listener)));
        let (port, listener) =
            bound.map_err(|error| self.failed(format!("a listener for control links: {error}")))?;
        let (key, epoch) =
            secret().map_err(|error| self.failed(format!("the run's secret: {error}")))?;
        let terms = Terms {
            key,
            epoch,
            host: idents[0].host.clone(),
            port,
            addresses: own_addresses(),
            names: idents.iter().map(Ident::name).collect(),
            memory: idents.iter().filter_map(|ident| ident.memory).min(),
            lack_integers: (0..idents.len()).filter(|rank| idents[*rank].lacks_integers).collect(),
        };
        Ok((terms, listener))
    }

    /// Takes in everybody who knows the secret.
    fn accept(&self, terms: &Terms, listener: &TcpListener) -> Result<Seats, Broken> {
        let unready = |error| self.failed(format!("a listener for control links: {error}"));
        listener.set_nonblocking(true).map_err(unready)?;
        let (found, connections) = channel();
        let mut by_rank: Vec<Option<Connection>> = (1..self.ranks).map(|_| None).collect();
        let mut absent = None;
        while let Some(at) = by_rank.iter().position(Option::is_none) {
            match listener.accept() {
                Ok((stream, address)) => {
                    // Apart: whoever connects and says nothing holds up nobody.
                    let (terms, found) = (terms.clone(), found.clone());
                    let greet = move || greet(stream, address, &terms, &found);
                    // Without a thread the stream closes, and whoever it was tries again.
                    let _ = std::thread::Builder::new().spawn(greet);
                }
                Err(_) => std::thread::sleep(LOOK),
            }
            while let Ok(connection) = connections.try_recv() {
                let Connection { rank, .. } = connection;
                match by_rank.get_mut(rank - 1) {
                    Some(seat @ None) => *seat = Some(connection),
                    _ => tracing::warn!("a second connection as rank {rank} was refused"),
                }
            }
            if Instant::now() >= self.until {
                let what = format!("the control link of {}", terms.names[at + 1]);
                absent = Some(self.absent(at + 1, what));
                break;
            }
        }
        Ok((by_rank.into_iter().flatten().collect(), absent))
    }

    /// Another rank's part up to the verdict.
    fn follow(&self, own: &Ident) -> Result<Terms, Broken> {
        self.send(0, "who is there", own)?;
        match self.receive(0, "who is taken")? {
            Verdict::Taken(terms) => Ok(terms),
            Verdict::Refused(why) => Err(why),
        }
    }

    /// Connects with rank 0 at one of its addresses.
    fn connect(&self, terms: &Terms, own: &Ident) -> Result<Connection, Broken> {
        let addresses = addresses_of(terms, own);
        let mut last = String::new();
        loop {
            for address in &addresses {
                let left = self.until.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    let shown: Vec<String> = addresses.iter().map(|a| a.to_string()).collect();
                    let (name, shown) = (&terms.names[0], shown.join(", "));
                    let what = format!("the control link of {name} at {shown} ({last})");
                    return Err(self.absent(0, what));
                }
                match self.introduce(*address, terms, left.min(ONE_ADDRESS)) {
                    Ok(connection) => return Ok(connection),
                    Err(error) => last = error.to_string(),
                }
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Says who this rank is, and hears the same of rank 0.
    fn introduce(
        &self,
        address: SocketAddr,
        terms: &Terms,
        longest: Duration,
    ) -> std::io::Result<Connection> {
        let (rank, secret) = (self.link.rank(), terms.secret());
        let mut stream = TcpStream::connect_timeout(&address, longest)?;
        stream.set_read_timeout(Some(longest))?;
        stream.set_write_timeout(Some(longest))?;
        let (mut close, mut open) = (Seal::new(secret, rank, 0), Seal::new(secret, 0, rank));
        stream.write_all(&close.close(b"hello"))?;
        let frame = read_frame(&mut stream, LONGEST_HELLO)?;
        let frame = frame.ok_or(std::io::ErrorKind::ConnectionReset)?;
        open.open(&frame).map_err(std::io::Error::other)?;
        Ok(Connection { rank: 0, name: terms.names[0].clone(), stream, close, open })
    }

    fn call(&self, name: &str) -> Call {
        Call {
            name: format!("joining: {name}"),
            operation: Operation::Pass,
            number: 0,
            elements: 0,
            width: 1,
        }
    }

    fn send<T: Serialize>(&self, to: usize, name: &str, value: &T) -> Result<(), Broken> {
        let bytes = encode(value);
        self.link.send(to, Frame { lane: Lane::Groups, call: self.call(name), bytes })
    }

    fn receive<T: for<'a> Deserialize<'a>>(&self, from: usize, name: &str) -> Result<T, Broken> {
        let call = self.call(name);
        let frame = self.link.take(from, Lane::Groups, &call, self.until)?;
        let frame = frame.ok_or_else(|| self.absent(from, format!("word of {name}")))?;
        let unread = |error| self.failed(format!("rank {from} joins with {error}"));
        decode(&frame.bytes).map_err(unread)
    }

    fn failed(&self, why: String) -> Broken {
        Broken::Failed { rank: self.link.rank(), why, code: 1 }
    }

    fn absent(&self, missing: usize, what: String) -> Broken {
        let (rank, seconds) = (self.link.rank(), self.longest.as_secs());
        Broken::Absent { rank, missing, what, seconds }
    }
}

impl Terms {
    fn secret(&self) -> Secret {
        Secret { key: self.key, epoch: self.epoch }
    }
}

impl Ident {
    /// How the rank is called in messages.
    pub fn name(&self) -> String {
        format!("process {} on {}", self.pid, self.host)
    }
}

/// Answers somebody who has connected to rank 0, if it knows the secret.
fn greet(mut stream: TcpStream, address: SocketAddr, terms: &Terms, found: &Sender<Connection>) {
    let secret = terms.secret();
    let mut meet = || -> std::io::Result<Connection> {
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(ONE_HELLO))?;
        stream.set_write_timeout(Some(ONE_HELLO))?;
        let frame = read_frame(&mut stream, LONGEST_HELLO)?;
        let frame = frame.ok_or(std::io::ErrorKind::UnexpectedEof)?;
        let strange = || std::io::Error::other("a frame that cannot be read");
        let rank = sender(&frame).filter(|rank| (1..terms.names.len()).contains(rank));
        let rank = rank.ok_or_else(strange)?;
        let (mut close, mut open) = (Seal::new(secret, 0, rank), Seal::new(secret, rank, 0));
        open.open(&frame).map_err(std::io::Error::other)?;
        stream.write_all(&close.close(b"welcome"))?;
        let (name, stream) = (terms.names[rank].clone(), stream.try_clone()?);
        Ok(Connection { rank, name, stream, close, open })
    };
    match meet() {
        Ok(connection) => drop(found.send(connection)),
        Err(error) => tracing::warn!("a connection from {address} was refused: {error}"),
    }
}

/// Why ranks do not belong to one run: the first that differs from rank 0, and in what.
fn refusal(idents: &[Ident]) -> Option<Broken> {
    let first = &idents[0];
    idents.iter().enumerate().skip(1).find_map(|(rank, ident)| {
        let refused = |why: String| {
            let why = format!("{} is not taken: {why}", ident.name());
            Some(Broken::Failed { rank, why, code: 2 })
        };
        if ident.binary != first.binary {
            return refused(format!(
                "its binary has the hash {}, rank 0's {}; start the same binary on every host",
                short(&ident.binary),
                short(&first.binary)
            ));
        }
        if ident.processes != first.processes {
            let (its, theirs) = (ident.processes, first.processes);
            return refused(format!("it was told of {its} processes, rank 0 of {theirs}"));
        }
        if ident.config != first.config {
            return refused(format!(
                "its config has the hash {}, rank 0's {}: {}; start every rank with the same TOML and --set",
                short(&hash(&ident.config)),
                short(&hash(&first.config)),
                differences(&ident.config, &first.config)
            ));
        }
        None
    })
}

fn short(hash: &str) -> &str {
    hash.get(..12).unwrap_or(hash)
}

fn hash(config: &BTreeMap<String, String>) -> String {
    blake3::hash(&encode(config)).to_hex().to_string()
}

fn differences(own: &BTreeMap<String, String>, other: &BTreeMap<String, String>) -> String {
    let keys: std::collections::BTreeSet<&String> = own.keys().chain(other.keys()).collect();
    let differ: Vec<&String> = keys.into_iter().filter(|k| own.get(*k) != other.get(*k)).collect();
    let value = |config: &BTreeMap<String, String>, key: &String| {
        config.get(key).cloned().unwrap_or_else(|| "nothing".to_string())
    };
    let named = differ
        .iter()
        .take(MOST_NAMED)
        .map(|key| format!("{key} = {} instead of {}", value(own, key), value(other, key)));
    let more = differ.len().saturating_sub(MOST_NAMED);
    let more = (more > 0).then(|| format!("and {more} more"));
    named.chain(more).collect::<Vec<_>>().join(", ")
}

/// A key that nobody can guess, and a number for the run.
fn secret() -> std::io::Result<([u8; 32], u64)> {
    let (mut key, mut epoch) = ([0; 32], [0; 8]);
    let mut random = std::fs::File::open("/dev/urandom")?;
    random.read_exact(&mut key)?;
    random.read_exact(&mut epoch)?;
    Ok((key, u64::from_le_bytes(epoch)))
}

/// This host's addresses, those for itself alone last.
fn own_addresses() -> Vec<Ipv4Addr> {
    let table = std::fs::read_to_string("/proc/net/fib_trie").unwrap_or_default();
    let mut addresses = local_addresses(&table);
    addresses.retain(|address| !address.is_loopback());
    addresses.push(Ipv4Addr::LOCALHOST);
    addresses
}

/// The addresses of a routing table that are the host's own.
fn local_addresses(table: &str) -> Vec<Ipv4Addr> {
    let (mut found, mut last) = (Vec::new(), None);
    for line in table.lines() {
        let line = line.trim();
        if let Some(address) = line.strip_prefix("|-- ") {
            last = address.parse::<Ipv4Addr>().ok();
        } else if line == "/32 host LOCAL"
            && let Some(address) = last
            && !found.contains(&address)
        {
            found.push(address);
        }
    }
    found
}

/// Where rank 0 may be found from here: on the same host by loopback, else by each address and by its name.
fn addresses_of(terms: &Terms, own: &Ident) -> Vec<SocketAddr> {
    let mut addresses: Vec<SocketAddr> =
        terms.addresses.iter().map(|address| SocketAddr::from((*address, terms.port))).collect();
    match own.host == terms.host {
        true => addresses.reverse(),
        false => {
            addresses.retain(|address| !address.ip().is_loopback());
            let named = (terms.host.as_str(), terms.port).to_socket_addrs();
            for address in named.into_iter().flatten().filter(|a| !a.ip().is_loopback()) {
                if !addresses.contains(&address) {
                    addresses.push(address);
                }
            }
        }
    }
    addresses
}

#[cfg(test)]
mod tests;
