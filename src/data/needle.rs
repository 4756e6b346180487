//! A needle in a haystack: sentences that say nothing, one fact among them, and at the end a question that it answers.
//!
//! Rules only. A haystack is made of units that the caller chooses: the tokens of a model that is measured, or the words
//! and marks of a page that is written before there is a tokenizer. Which haystacks go into which file is `needle_files`.
//!
//! Invariants:
//!   * a haystack has the asked length exactly, and every needle once
//!   * the first needle begins where a sentence begins, at the beginning nearest to the asked depth
//!   * no sentence of the hay holds a name or a thing of a needle

use rehearsal_kernels::random::Draws;
use std::ops::Range;

/// Who may hide something.
pub const NAMES: [&str; 16] = [
    "Ada", "Ben", "Cora", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivan", "Jane", "Karl", "Lena",
    "Mona", "Nick", "Olga", "Paul",
];

/// What may be hidden.
pub const THINGS: [&str; 32] = [
    "apple", "book", "coin", "drum", "egg", "fork", "glove", "hat", "ink", "jar", "key", "lamp",
    "map", "nail", "oar", "pen", "ring", "shoe", "tent", "urn", "vase", "whip", "yarn", "brick",
    "candle", "dress", "flute", "harp", "kite", "lens", "mask", "rope",
];

/// The hay.
pub const HAY: [&str; 10] = [
    " The grass is green.",
    " The sky is blue.",
    " The sun is yellow.",
    " Here we go.",
    " There and back again.",
    " The road is long.",
    " The night is cold.",
    " We walk along the river.",
    " It is late.",
    " Birds sing in the trees.",
];

/// Somebody hid something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Needle {
    /// Who.
    pub name: &'static str,
    /// What.
    pub thing: &'static str,
}

impl Needle {
    /// Needles of different names; their things may be the same.
    pub fn draw(count: usize, draws: &mut Draws) -> Vec<Needle> {
        assert!(count <= NAMES.len(), "each needle has a name of its own");
        let mut names = NAMES;
        draws.shuffle(&mut names);
        let thing = |draws: &mut Draws| THINGS[draws.below(THINGS.len() as u64) as usize];
        names[..count].iter().map(|name| Needle { name, thing: thing(draws) }).collect()
    }

    /// The sentence that stands in the hay.
    pub fn fact(&self) -> String {
        format!(" {} hid the {}.", self.name, self.thing)
    }

    /// What stands after the hay, up to where the answer begins.
    pub fn question(&self) -> String {
        format!(" What did {} hide? The", self.name)
    }

    /// The answer as it goes on from the question.
    pub fn answer(&self) -> String {
        format!(" {}", self.thing)
    }

    /// True if the reply's first word is the thing: a model need not know where to stop.
    pub fn is_found(&self, reply: &str) -> bool {
        let word = reply.trim_start().split(|c: char| !c.is_alphanumeric()).next();
        word == Some(self.thing)
    }
}

/// A haystack with its question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Haystack<T> {
    /// Hay, facts and question.
    pub units: Vec<T>,
    /// Where the first needle's fact stands.
    pub fact: Range<usize>,
}

/// Hides `needles` in a haystack of `length` units, its question included, and asks for the first, which stands at
/// `depth` (from 0, the beginning, to 1, the end); the others lie anywhere. `None` if the length does not hold them.
pub fn haystack<T: Clone>(
    units: &dyn Fn(&str) -> Vec<T>,
    needles: &[Needle],
    length: usize,
    depth: f64,
    draws: &mut Draws,
) -> Option<Haystack<T>> {
    let facts: Vec<Vec<T>> = needles.iter().map(|needle| units(&needle.fact())).collect();
    let question = units(&needles[0].question());
    let taken = question.len() + facts.iter().map(Vec::len).sum::<usize>();
    let sentences = hay(units, length.checked_sub(taken)?, draws);
    let mut beginnings = vec![0];
    for sentence in &sentences {
        beginnings.push(beginnings.last().expect("it begins with one") + sentence.len());
    }
    let room = (length - taken) as f64;
    let nearest = |depth: f64| {
        let distance = |place: &usize| (beginnings[*place] as f64 - depth * room).abs();
        (0..beginnings.len()).min_by(|a, b| distance(a).total_cmp(&distance(b))).unwrap_or(0)
    };
    let asked = nearest(depth);
    let places: Vec<usize> = facts[1..].iter().map(|_| nearest(draws.uniform())).collect();
    let (mut all, mut fact) = (Vec::with_capacity(length), 0..0);
    for place in 0..beginnings.len() {
        for (other, _) in facts[1..].iter().zip(&places).filter(|(_, at)| **at == place) {
            all.extend_from_slice(other);
        }
        if place == asked {
            fact = all.len()..all.len() + facts[0].len();
            all.extend_from_slice(&facts[0]);
        }
        all.extend(sentences.get(place).into_iter().flatten().cloned());
    }
    all.extend(question);
    Some(Haystack { units: all, fact })
}

/// Sentences of `room` units together; the first breaks off if it does not fit.
fn hay<T: Clone>(units: &dyn Fn(&str) -> Vec<T>, room: usize, draws: &mut Draws) -> Vec<Vec<T>> {
    let (mut sentences, mut filled) = (Vec::new(), 0);
    while filled < room {
        let sentence = units(HAY[draws.below(HAY.len() as u64) as usize]);
        filled += sentence.len();
        sentences.push(sentence);
    }
    // It is the last one that is too long. Only its beginning is kept: two marks in a row might be one token.
    if let Some(mut last) = sentences.pop() {
        last.truncate(last.len() + room - filled);
        sentences.insert(0, last);
    }
    sentences
}

#[cfg(test)]
mod tests {
    use super::*;
    use rehearsal_kernels::random::Stream;

    fn letters(text: &str) -> Vec<char> {
        text.chars().collect()
    }

    fn draws(index: u64) -> Draws {
        Draws::new(3, Stream::Data, [index, 0, 0])
    }

    fn made(length: usize, depth: f64, count: usize, index: u64) -> (Vec<Needle>, Haystack<char>) {
        let draws = &mut draws(index);
        let needles = Needle::draw(count, draws);
        let stack = haystack(&letters, &needles, length, depth, draws).unwrap();
        (needles, stack)
    }

    #[test]
    fn a_haystack_has_its_length_exactly_and_each_fact_once_and_ends_with_the_question() {
        for (index, length) in [60, 61, 97, 400, 1003].into_iter().enumerate() {
            for count in 1..=if length < 400 { 1 } else { 4 } {
                for depth in [0.0, 0.3, 1.0] {
                    let (needles, stack) = made(length, depth, count, index as u64);
                    let text: String = stack.units.iter().collect();
                    assert_eq!(stack.units.len(), length);
                    for needle in &needles {
                        assert_eq!(text.matches(&needle.fact()).count(), 1, "{text}");
                        assert_eq!(
                            text.matches(needle.name).count(),
                            1 + usize::from(needle == &needles[0])
                        );
                    }
                    assert!(text.ends_with(&needles[0].question()), "{text}");
                    let fact: String = stack.units[stack.fact.clone()].iter().collect();
                    assert_eq!(fact, needles[0].fact());
                }
            }
        }
    }

    #[test]
    fn the_fact_stands_at_the_asked_depth_to_half_a_sentence() {
        let longest = HAY.iter().map(|sentence| sentence.len()).max().unwrap();
        for index in 0..40 {
            for percent in [0, 10, 25, 50, 75, 100] {
                let length = 300 + 7 * index as usize;
                let (needles, stack) = made(length, f64::from(percent) / 100.0, 1, index);
                let room = length - needles[0].fact().len() - needles[0].question().len();
                let wanted = room as f64 * f64::from(percent) / 100.0;
                let off = (stack.fact.start as f64 - wanted).abs();
                assert!(off <= longest as f64 / 2.0, "{percent} %: {off} letters away");
                if percent == 0 || percent == 100 {
                    assert_eq!(off, 0.0, "at the very end");
                }
            }
        }
    }

    #[test]
    fn what_a_length_does_not_hold_is_not_made() {
        let needles = Needle::draw(1, &mut draws(0));
        let least = needles[0].fact().len() + needles[0].question().len();
        let made = |length| haystack(&letters, &needles, length, 0.5, &mut draws(1));
        assert!(made(least - 1).is_none());
        assert_eq!(made(least).unwrap().units.len(), least);
    }

    #[test]
    fn the_same_draws_make_the_same_haystack_and_others_another() {
        assert_eq!(made(200, 0.5, 2, 7), made(200, 0.5, 2, 7));
        assert_ne!(made(200, 0.5, 2, 7).1, made(200, 0.5, 2, 8).1);
    }

    #[test]
    fn the_hay_gives_no_answer_away() {
        let hay = HAY.concat();
        for word in NAMES.iter().chain(&THINGS) {
            assert!(!hay.split(|c: char| !c.is_alphabetic()).any(|other| other == *word), "{word}");
        }
    }

    #[test]
    fn a_reply_is_right_if_its_first_word_is_the_thing() {
        let needle = Needle { name: "Ada", thing: "pen" };
        for right in [" pen", "pen.", " pen, of course", "\n pen\nWhat"] {
            assert!(needle.is_found(right), "{right:?}");
        }
        for wrong in ["", " pens", " pencil", " the pen", " Pen", "."] {
            assert!(!needle.is_found(wrong), "{wrong:?}");
        }
    }
}
