//! The share of correct `<<a*b=c>>` annotations in a reply (GSM8K's calculator marks).

use super::expression::{evaluate, plain_number};
use super::verdict::Verdict;

/// Judges by the share of annotations that are right. Every `<<` counts as one, closed or not; a
/// reply without any scores 0.
pub fn annotations(reply: &str) -> Verdict {
    let mut found = 0usize;
    let mut right = 0usize;
    for after in reply.split("<<").skip(1) {
        found += 1;
        right += usize::from(after.split_once(">>").is_some_and(|(inside, _)| is_right(inside)));
    }
    if found == 0 {
        return Verdict::wrong("no annotation");
    }
    let reason = format!("{right} of {found} annotations are right");
    Verdict { score: right as f64 / found as f64, passed: right == found, reason }
}

/// `a*b=c` with an operator on the left. A result with decimals may be rounded at its last one; a
/// whole result must be exact.
fn is_right(inside: &str) -> bool {
    let Some((left, right)) = inside.rsplit_once('=') else { return false };
    let has_operator = left.trim().trim_start_matches('-').contains(['+', '-', '*', '/']);
    let (Some(value), Some((stated, decimals))) = (evaluate(left), plain_number(right)) else {
        return false;
    };
    let rounding = if decimals == 0 { 0.0 } else { 0.5 * 10f64.powi(-decimals) };
    let noise = 1e-9 * value.abs().max(1.0);
    has_operator && (value - stated).abs() <= rounding + noise
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_annotation_counts_once() {
        let score = |reply: &str| annotations(reply).score;
        assert_eq!(score("48/2 = <<48/2=24>>24, then <<48+24=72>>72"), 1.0);
        assert_eq!(score("<<48/2=24>> <<48+24=73>>"), 0.5);
        assert_eq!(score("<<48/2=24>> <<48+24=72"), 0.5, "an open one counts as wrong");
        assert_eq!(score("<<<<1+1=2>>"), 0.5);
        assert_eq!(score("48/2=24"), 0.0);
        assert_eq!(score(""), 0.0);
    }

    #[test]
    fn results_are_exact_or_rounded_at_their_last_decimal() {
        for right in [
            "100/3=33.33",
            "100/3=33.3",
            "0.2*50=10",
            "10/4=2.5",
            "100*(1-.25)=75",
            "2*-3=-6",
            "1,000*2=2,000",
            "$5*2=$10",
            "50%*10=5",
            "(1+2)*(3+4)=21",
            "2*3+4=10",
            "8-3-2=3",
        ] {
            assert!(is_right(right), "{right}");
        }
        for wrong in [
            "10/4=2",
            "10/4=3",
            "100/3=33.34",
            "1=1",
            "-1=-1",
            "1/0=0",
            "1+1=",
            "=2",
            "1+1",
            "1+=1",
            "(1+1=2",
            "2+2=4=5",
            "a*b=c",
            "2**3=8",
            "1 1+1=12",
        ] {
            assert!(!is_right(wrong), "{wrong}");
        }
    }
}
