//! Outpost: the seats of a run with several processes: couriers at rank 0, and a deputy with its worker everywhere else.
//!
//! Beside `company`, which knows every other actor.

use super::company::{Hiring, Seats, Setup};
use super::courier::Courier;
use super::deputy::{Deputy, DeputyPorts};
use super::mail::Mail;
use super::messages::*;
use super::monitor::{Monitor, Notes};
use super::port::{Desk, Limits, Port, Seat};
use super::staff::Staff;
use super::worker::{Crew, DeviceLink, Worker};
use anyhow::Result;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

/// The seats.
pub struct RankSeats {
    mail: Option<Arc<Mail>>,
    /// Rank 0: one courier for each other rank.
    couriers: Vec<(usize, Seat<Courier>)>,
    /// Rank 0: the other ranks' workers, as they say they are.
    mirrors: BTreeMap<usize, Arc<Desk>>,
    /// Rank 0: the ranks that only sample, as one device.
    pub sampler: Seat<Worker>,
    /// The first of those ranks.
    trainers: usize,
    /// Other ranks: who serves rank 0.
    pub deputy: Seat<Deputy>,
}

impl RankSeats {
    /// The seats of this process; a run of one process has none that anybody takes.
    pub fn new(mail: Option<Arc<Mail>>, samplers: usize, limits: Limits) -> RankSeats {
        let lead = mail.iter().filter(|mail| mail.rank() == 0);
        let others: Vec<usize> =
            lead.flat_map(|mail| mail.others().map(|(rank, _)| rank)).collect();
        let courier = |rank: &usize| (*rank, Seat::new(&format!("courier-{rank}"), limits));
        let mirror = |rank: &usize| {
            let desk = Desk::new(&format!("worker-{rank}"));
            // Its silence counts from the beginning.
            desk.mirror(Pulse::default());
            (*rank, desk)
        };
        RankSeats {
            couriers: others.iter().map(courier).collect(),
            mirrors: others.iter().map(mirror).collect(),
            sampler: Seat::new("sampler", limits),
            trainers: (others.len() + 1).saturating_sub(samplers),
            deputy: Seat::new("deputy", limits),
            mail,
        }
    }

    /// How many processes the run has, as rank 0 sees it.
    pub fn count(&self) -> usize {
        self.couriers.len() + 1
    }

    /// Whether rank 0 leads this process.
    pub fn is_led(&self) -> bool {
        self.mail.as_ref().is_some_and(|mail| mail.rank() > 0)
    }

    /// The mail with the other processes, if there are any.
    pub fn mail(&self) -> Option<&Arc<Mail>> {
        self.mail.as_ref()
    }

    /// What can be seen of the couriers and of the workers that they reach.
    pub fn desks(&self) -> impl Iterator<Item = Arc<Desk>> {
        let couriers = self.couriers.iter().map(|(_, seat)| Arc::clone(seat.desk()));
        couriers.chain(self.mirrors.values().map(Arc::clone))
    }

    /// The ways to the other ranks' devices that train, as `asker` sees them.
    pub fn crew(&self, asker: &Arc<Desk>) -> Crew {
        self.crew_of(asker, 1..self.trainers)
    }

    fn crew_of(&self, asker: &Arc<Desk>, ranks: Range<usize>) -> Crew {
        let seats = self.couriers.iter().filter(|(rank, _)| ranks.contains(rank));
        Crew { others: seats.map(|(_, seat)| seat.port(asker)).collect(), mail: self.mail.clone() }
    }

    /// Who stands for the ranks that only sample: with a device of this process, or with those of others.
    pub fn sampler(
        &self,
        hiring: &Hiring,
        link: Option<DeviceLink>,
        groups: Port<AcceptGroup>,
    ) -> Box<dyn Staff> {
        let crew = self.crew_of(self.sampler.desk(), self.trainers..usize::MAX);
        hiring.member(&self.sampler, move |post| {
            Worker::new(post, link.clone(), groups.clone(), crew.clone())
        })
    }

    /// Who reaches the other ranks; finished groups go where `groups` says.
    pub fn couriers(
        &self,
        hiring: &Hiring,
        setup: &Setup,
        groups: impl Fn(&Arc<Desk>) -> Port<AcceptGroup>,
    ) -> Vec<Box<dyn Staff>> {
        let Some(mail) = &self.mail else { return Vec::new() };
        mail.show(self.mirrors.clone(), &setup.stop);
        let courier = |(rank, seat): &(usize, Seat<Courier>)| {
            let (mail, rank, groups) = (Arc::clone(mail), *rank, groups(seat.desk()));
            hiring.member(seat, move |post| {
                Courier::new(post, Arc::clone(&mail), rank, groups.clone())
            })
        };
        self.couriers.iter().map(courier).collect()
    }

    /// Everybody in a process that rank 0 leads.
    pub fn outpost(
        &self,
        seats: &Seats,
        hiring: &Hiring,
        setup: &Setup,
        link: &DeviceLink,
    ) -> Result<Vec<Box<dyn Staff>>> {
        let mail = Arc::clone(self.mail.as_ref().expect("an outpost has mail"));
        // Nothing is kept here: the journal is rank 0's.
        let (run, mailbox) = (&setup.folders.run, setup.limits.mailbox);
        let notes = Notes::open(None, run, Vec::new(), mailbox, None, true)?;
        let (notes, link) = (Arc::new(notes), link.clone());
        let groups: Port<AcceptGroup> = self.deputy.port(seats.worker.desk());
        let ports = DeputyPorts {
            carry: seats.worker.port(self.deputy.desk()),
            end: seats.supervisor.port(self.deputy.desk()),
        };
        let worker = Arc::clone(seats.worker.desk());
        Ok(vec![
            hiring.member(&seats.monitor, move |post| Monitor::new(post, Arc::clone(&notes))),
            hiring.member(&seats.worker, move |post| {
                Worker::new(post, Some(link.clone()), groups.clone(), Crew::default())
            }),
            hiring.member(&self.deputy, move |post| {
                Deputy::new(post, Arc::clone(&mail), ports.clone(), Arc::clone(&worker))
            }),
        ])
    }
}
