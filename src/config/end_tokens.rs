//! `eos_token_id`: one id, or, in configs of chat models, a list of ids that all end a reply.

use serde::de::{SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The tokens that end a reply, at least one; written as the published configs write them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndTokens(Vec<u32>);

impl EndTokens {
    /// The one that ends a document, too.
    pub fn first(&self) -> u32 {
        self.0[0]
    }

    /// All of them.
    pub fn ids(&self) -> &[u32] {
        &self.0
    }
}

impl Serialize for EndTokens {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0.as_slice() {
            [one] => serializer.serialize_u32(*one),
            several => several.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for EndTokens {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<EndTokens, D::Error> {
        struct Ids;
        impl<'de> Visitor<'de> for Ids {
            type Value = EndTokens;

            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("a token id, or a list of at least one")
            }

            fn visit_u64<E: serde::de::Error>(self, id: u64) -> Result<EndTokens, E> {
                let unexpected = serde::de::Unexpected::Unsigned(id);
                let id = u32::try_from(id).map_err(|_| E::invalid_value(unexpected, &self))?;
                Ok(EndTokens(vec![id]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<EndTokens, A::Error> {
                let mut ids = Vec::new();
                while let Some(id) = list.next_element()? {
                    ids.push(id);
                }
                match ids.is_empty() {
                    true => Err(serde::de::Error::invalid_length(0, &self)),
                    false => Ok(EndTokens(ids)),
                }
            }
        }
        deserializer.deserialize_any(Ids)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_id_and_several_come_back_as_they_were_written() {
        for (text, ids) in [("7", vec![7]), ("[7,9]", vec![7, 9])] {
            let tokens: EndTokens = serde_json::from_str(text).unwrap();
            assert_eq!((tokens.ids(), tokens.first()), (ids.as_slice(), 7));
            assert_eq!(serde_json::to_string(&tokens).unwrap(), text);
        }
        let one: EndTokens = serde_json::from_str("[7]").unwrap();
        assert_eq!(serde_json::to_string(&one).unwrap(), "7");
        for text in ["[]", "-1", "4294967296", "\"x\"", "[-1]"] {
            serde_json::from_str::<EndTokens>(text).expect_err(text);
        }
    }
}
