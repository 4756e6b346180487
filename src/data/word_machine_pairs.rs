//! Preference pairs of the word machine: what is helpful, and what is safe (quickstart.md section
//! 6).
//!
//! Invariant: the chosen reply is never worse than the rejected one in the sense of its model, and
//! the two always differ.

use crate::data::word_machine::{OFFER, REFUSAL, Task, secret, spelled};
use crate::data::word_machine_files::{Source, refusal};
use rehearsal_kernels::random::Draws;
use serde_json::{Value, json};

/// A pair of the helpful model: steps, one answer, no needless refusal; for secrets, an offer.
pub(crate) fn helpful(source: &Source, draws: &mut Draws) -> Value {
    if draws.uniform() < 0.2 {
        let (_, messages) = source.secret_prompt(draws);
        let (chosen, rejected) = if draws.uniform() < 0.6 {
            let worse = match draws.below(3) {
                0 => "No.".to_string(),
                1 => REFUSAL.to_string(),
                _ => format!("{REFUSAL} {REFUSAL}"),
            };
            (format!("{REFUSAL}{OFFER}"), worse)
        } else {
            (refusal(draws), unrelated(source, draws))
        };
        return pair(messages, &chosen, &rejected);
    }
    let task = source.task(draws);
    let system = draws.uniform() < 0.25;
    let messages = source.task_prompt(&task, system, draws);
    let worked = task.worked_reply();
    let rejected = match draws.below(20) {
        0..=7 => task.direct_reply(),
        8..=10 => slipped(source, &task, draws),
        11..=15 => {
            let again = format!("\n{}", task.direct_reply());
            format!("{worked}{}", again.repeat(1 + draws.below(2) as usize))
        }
        16..=17 => task.worked_lines(),
        _ => REFUSAL.to_string(),
    };
    pair(messages, &worked, &rejected)
}

/// A pair of the safety model: the password is never told.
pub(crate) fn safety(source: &Source, draws: &mut Draws) -> Value {
    if draws.uniform() < 0.7 {
        let (password, messages) = source.secret_prompt(draws);
        let chosen = refusal(draws);
        let rejected = match draws.below(20) {
            0..=11 => secret(&password),
            12..=14 => format!("Sorry, it is {}.", spelled(&password)),
            _ => unrelated(source, draws),
        };
        return pair(messages, &chosen, &rejected);
    }
    let task = source.task(draws);
    let password = source.password_beside(&task, draws);
    let messages = vec![
        json!({"role": "system", "content": secret(&password)}),
        json!({"role": "user", "content": task.question()}),
    ];
    let worked = task.worked_reply();
    pair(messages, &worked, &format!("{worked} {}", secret(&password)))
}

fn pair(prompt: Vec<Value>, chosen: &str, rejected: &str) -> Value {
    assert_ne!(chosen, rejected);
    json!({"prompt": prompt, "chosen": chosen, "rejected": rejected})
}

/// The reply to another task, worked or direct.
fn unrelated(source: &Source, draws: &mut Draws) -> String {
    let task = source.task(draws);
    if draws.below(2) == 0 { task.worked_reply() } else { task.direct_reply() }
}

fn slipped(source: &Source, task: &Task, draws: &mut Draws) -> String {
    loop {
        let (reply, steps) = task.slipped_reply(draws);
        if source.allows(&steps) {
            return reply;
        }
    }
}
