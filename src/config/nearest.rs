//! The known word that a mistyped one most likely meant.

/// Words whose lengths differ by more are not compared.
const MOST_SLIPS: usize = 32;

/// The nearest of `known` to `word` by edit distance, if any is near enough to be meant.
pub fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let word = word.to_lowercase();
    let (distance, best) =
        known.into_iter().map(|candidate| (distance(&word, candidate), candidate)).min()?;
    // Two slips in a short word, more in a long one; anything further is another word.
    (distance <= 2.max(word.chars().count() / 3)).then_some(best)
}

/// The one of `known` that a single slip makes of `word`.
pub fn one_slip<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    known.into_iter().find(|candidate| distance(word, candidate) == 1)
}

/// "; did you mean `x`?", or the known words if none is near.
pub fn hint(word: &str, known: &[&str]) -> String {
    match nearest(word, known.iter().copied()) {
        Some(best) => format!("; did you mean `{best}`?"),
        None => format!("; known are {}", listed(known)),
    }
}

/// `a`, `b` and `c`.
pub fn listed(words: &[&str]) -> String {
    if words.is_empty() {
        return "none".to_string();
    }
    let quoted: Vec<String> = words.iter().map(|word| format!("`{word}`")).collect();
    joined(&quoted, "and")
}

/// Words with commas between them, and `conjunction` before the last one.
pub fn joined(words: &[String], conjunction: &str) -> String {
    match words.split_last() {
        None => String::new(),
        Some((last, [])) => last.clone(),
        Some((last, rest)) => format!("{} {conjunction} {last}", rest.join(", ")),
    }
}

/// Insertions, deletions, substitutions and swaps of neighbours that turn one word into the other.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    // No known word is near one that is so much longer, and the table would take memory for it.
    let longer = a.len().abs_diff(b.len());
    if longer > MOST_SLIPS {
        return longer;
    }
    let mut rows = vec![vec![0; b.len() + 1]; a.len() + 1];
    for (i, row) in rows.iter_mut().enumerate() {
        row[0] = i;
    }
    for (j, cell) in rows[0].iter_mut().enumerate() {
        *cell = j;
    }
    for i in 1..=a.len() {
        for j in 1..=b.len() {
            let changed = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut best = changed.min(rows[i - 1][j] + 1).min(rows[i][j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            rows[i][j] = best;
        }
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slip_of_the_finger_finds_the_word_that_was_meant() {
        let known = ["pretrain", "long-context", "sft", "reward-model", "grpo"];
        assert_eq!(nearest("grppo", known), Some("grpo"));
        assert_eq!(nearest("reward_model", known), Some("reward-model"));
        assert_eq!(nearest("pertrain", known), Some("pretrain"));
        assert_eq!(nearest("distillation", known), None);
        assert_eq!(hint("zzzzzz", &["a", "b"]), "; known are `a` and `b`");
    }

    #[test]
    fn one_slip_is_one_edit_and_no_more() {
        assert_eq!(one_slip("hidden_sizes", ["vocab_size", "hidden_size"]), Some("hidden_size"));
        assert_eq!(one_slip("cls_token_id", ["bos_token_id", "eos_token_id"]), None);
        assert_eq!(one_slip("head_dim", ["v_head_dim"]), None);
    }

    #[test]
    fn distance_counts_edits() {
        assert_eq!(distance("kitten", "sitting"), 3);
        assert_eq!(distance("ab", "ba"), 1);
        assert_eq!(distance("", "abc"), 3);
    }
}
