//! What happens in this process, numbered: jobs that begin and end, recoveries that change, drills that are judged.
//! Listeners of the API and hooks follow it; whoever lost the connection goes on behind the last number that it knows.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use chrono::Utc;
use serde::Serialize;
use serde_json::Value;
use tokio::sync::watch;

/// How much of the past is known. Who comes later than that begins anew.
const KEPT: usize = 4096;

/// What an event is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Topic {
    /// A job began or ended.
    Job,
    /// A recovery's state, or its VM's, is another.
    Recovery,
    /// A drill has its verdict.
    Drill,
}

impl Topic {
    /// The event's name.
    pub fn name(self) -> &'static str {
        match self {
            Topic::Job => "job",
            Topic::Recovery => "recovery",
            Topic::Drill => "drill",
        }
    }
}

/// Something that has happened.
#[derive(Debug, Clone, PartialEq)]
pub struct Happened {
    /// Its number, from 1.
    pub number: u64,
    /// What it is about.
    pub topic: Topic,
    /// The machine that it belongs to, if it does to one.
    pub machine: Option<String>,
    /// The thing as the API shows it.
    pub thing: Value,
}

/// What has happened since the process began, as far as it is known.
#[derive(Debug)]
pub struct Events {
    /// Tells the numbers of this process from those of others.
    epoch: String,
    past: Mutex<VecDeque<Arc<Happened>>>,
    newest: watch::Sender<u64>,
}

impl Default for Events {
    fn default() -> Events {
        let epoch = format!("{:x}-{:x}", Utc::now().timestamp_micros(), std::process::id());
        Events { epoch, past: Mutex::default(), newest: watch::channel(0).0 }
    }
}

/// What follows a number.
#[derive(Debug, Clone, PartialEq)]
pub enum Following {
    /// All of it, in order.
    All(Vec<Arc<Happened>>),
    /// It is too long ago, or was never given.
    Lost,
}

impl Events {
    /// Notes what has happened.
    pub fn tell(&self, topic: Topic, machine: Option<&str>, thing: &impl Serialize) {
        let thing = serde_json::to_value(thing).unwrap_or_default();
        let mut past = self.past.lock().unwrap_or_else(PoisonError::into_inner);
        let number = *self.newest.borrow() + 1;
        past.push_back(Arc::new(Happened { number, topic, machine: machine.map(ToOwned::to_owned), thing }));
        if past.len() > KEPT {
            past.pop_front();
        }
        self.newest.send_replace(number);
    }

    /// The number of what has happened last.
    pub fn newest(&self) -> u64 {
        *self.newest.borrow()
    }

    /// Changes with each event.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.newest.subscribe()
    }

    /// What has happened after event `number`.
    pub fn after(&self, number: u64) -> Following {
        let past = self.past.lock().unwrap_or_else(PoisonError::into_inner);
        let newest = *self.newest.borrow();
        let oldest = past.front().map_or(newest + 1, |event| event.number);
        if number > newest || number + 1 < oldest {
            return Following::Lost;
        }
        Following::All(past.iter().filter(|event| event.number > number).cloned().collect())
    }

    /// The name of event `number` to somebody who may ask another process for what follows it.
    pub fn id(&self, number: u64) -> String {
        format!("{}-{number}", self.epoch)
    }

    /// The number of an event of this process, by its name.
    pub fn number(&self, id: &str) -> Option<u64> {
        let (epoch, number) = id.rsplit_once('-')?;
        number.parse().ok().filter(|_| epoch == self.epoch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(following: Following) -> Option<Vec<u64>> {
        match following {
            Following::All(events) => Some(events.iter().map(|event| event.number).collect()),
            Following::Lost => None,
        }
    }

    #[test]
    fn who_knows_the_last_number_misses_nothing_until_it_is_too_long_ago() {
        let events = Events::default();
        assert_eq!(numbers(events.after(0)), Some(vec![]));
        assert_eq!(numbers(events.after(1)), None, "that has not happened");
        for number in 1..=3 {
            events.tell(Topic::Job, None, &number);
        }
        assert_eq!(numbers(events.after(1)), Some(vec![2, 3]));
        assert_eq!(events.number(&events.id(2)), Some(2));
        assert_eq!(events.number(&Events::default().id(2)), None, "another process gave it");
        assert_eq!(events.number("2"), None);
        for number in 0..KEPT {
            events.tell(Topic::Job, None, &number);
        }
        assert_eq!(numbers(events.after(3)).map(|numbers| numbers.len()), Some(KEPT));
        assert_eq!(numbers(events.after(2)), None);
        assert_eq!(numbers(events.after(events.newest())), Some(vec![]));
    }
}
