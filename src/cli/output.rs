//! Standard output of the subcommands.
//!
//! An error is returned and not a panic, so that a reader that goes away (`| head`) ends the program quietly.

use crate::console::text::visible;
use anyhow::Result;
use serde::Serialize;
use std::io::{IsTerminal, Write};

/// Prints a line.
pub fn say(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{text}")?;
    Ok(out.flush()?)
}

/// Prints what a model said: as it is into a file or a pipe, and without what steers a terminal on one.
pub fn say_reply(text: &str) -> Result<()> {
    match std::io::stdout().is_terminal() {
        true => say(&visible(text)),
        false => say(text),
    }
}

/// Prints a value as one line of JSON.
pub fn say_json(value: &impl Serialize) -> Result<()> {
    say(&serde_json::to_string(value)?)
}

/// 1234567 as "1 234 567".
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(' ');
        }
        text.push(digit);
    }
    text
}

/// Seconds as a person says them.
pub fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 100.0 => format!("{s:.0} s"),
        s if s < 6000.0 => format!("{:.0} min", s / 60.0),
        s if s < 48.0 * 3600.0 => format!("{:.1} h", s / 3600.0),
        s => format!("{} days", grouped((s / 86_400.0).round() as u64)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_told_as_a_person_would() {
        assert_eq!(grouped(0), "0");
        assert_eq!(grouped(999), "999");
        assert_eq!(grouped(235_741_434_880), "235 741 434 880");
        assert_eq!(duration(7.4), "7 s");
        assert_eq!(duration(360.0), "6 min");
        assert_eq!(duration(9000.0), "2.5 h");
        assert_eq!(duration(864_000_000.0), "10 000 days");
    }
}
