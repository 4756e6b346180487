//! Text for a terminal of plain ASCII: what a model says is hostile until its control characters
//! are visible.

/// Makes control characters, direction overrides and everything outside ASCII visible, so that no
/// reply can move the cursor or hide itself.
pub(super) fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            ' '..='~' => out.push(c),
            '\n' => out.push_str("\\n"),
            '\t' => out.push_str("\\t"),
            other if (other as u32) < 0x100 => out.push_str(&format!("\\x{:02x}", other as u32)),
            other => out.push_str(&format!("\\u{{{:x}}}", other as u32)),
        }
    }
    out
}

/// The same for a terminal that shows every script: only what would steer it is made visible, line breaks and tabs stay.
pub fn visible(text: &str) -> String {
    let steers = |c: char| {
        c.is_control() && !matches!(c, '\n' | '\t')
            || matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if steers(c) { out.extend(c.escape_unicode()) } else { out.push(c) }
    }
    out
}

/// Cuts ASCII text to `width` characters, with `..` in place of what is gone.
pub(super) fn fitted(text: &str, width: usize) -> String {
    let text = printable(text);
    match text.len() <= width {
        true => text,
        false => format!("{}..", &text[..width.saturating_sub(2)]),
    }
}

/// Breaks ASCII text into lines of at most `width` characters.
pub(super) fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines = Vec::new();
    for line in text.split('\n') {
        // Of ASCII alone, so that bytes are characters.
        let line = printable(line);
        let mut rest = line.as_str();
        while rest.len() > width {
            let cut = rest[..=width].rfind(' ').filter(|cut| *cut > 0).unwrap_or(width);
            lines.push(rest[..cut].to_string());
            rest = rest[cut..].strip_prefix(' ').unwrap_or(&rest[cut..]);
        }
        lines.push(rest.to_string());
    }
    lines
}

/// Seconds as `12s`, `3m05s` or `2h07m`.
pub(super) fn duration(seconds: f64) -> String {
    let whole = if seconds.is_finite() { seconds.max(0.0).round() as u64 } else { 0 };
    match whole {
        0..60 => format!("{whole}s"),
        60..3600 => format!("{}m{:02}s", whole / 60, whole % 60),
        _ => format!("{}h{:02}m", whole / 3600, whole / 60 % 60),
    }
}

/// Bytes as MiB or GiB.
pub(super) fn bytes(count: u64) -> String {
    let mib = count as f64 / (1 << 20) as f64;
    if mib < 1024.0 { format!("{mib:.1} MiB") } else { format!("{:.2} GiB", mib / 1024.0) }
}

/// A number in six characters or little more, for a table.
pub(super) fn figure(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_string(),
        size if size >= 1e6 => format!("{value:.2e}"),
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.2}"),
        size if size >= 0.001 => format!("{value:.4}"),
        _ => format!("{value:.1e}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_control_character_reaches_the_terminal() {
        let hostile = "a\x1b[2Jb\r\x07\u{9b}31m\u{202e}\u{0}\u{7f}";
        let shown = printable(hostile);
        assert!(shown.bytes().all(|b| (b' '..=b'~').contains(&b)), "{shown:?}");
        assert_eq!(printable("x\x1b"), "x\\x1b");
        for width in 1..40 {
            assert!(wrapped(hostile, width).iter().all(|line| line.len() <= width));
        }
        assert!((2..40).all(|width| fitted(hostile, width).len() <= width));
    }

    #[test]
    fn what_steers_a_terminal_is_made_visible_and_every_script_stays() {
        assert_eq!(visible("a\x1b[2J\r\u{202e}b"), "a\\u{1b}[2J\\u{d}\\u{202e}b");
        assert_eq!(visible("drei ☃\n\tfünf 字"), "drei ☃\n\tfünf 字");
    }

    #[test]
    fn durations_and_sizes_read_well() {
        assert_eq!(
            [0.4, 59.6, 185.0, 7620.0, f64::NAN].map(duration),
            ["0s", "1m00s", "3m05s", "2h07m", "0s"]
        );
        assert_eq!([0, 3 << 19, 3 << 29].map(bytes), ["0.0 MiB", "1.5 MiB", "1.50 GiB"]);
        assert_eq!([0.0, 3.25, 123.4, 1e-9].map(figure), ["0", "3.2500", "123", "1.0e-9"]);
    }
}
