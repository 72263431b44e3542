//! Data of the options that have some, decoded with every length checked.

use zerocopy::FromBytes;
use zerocopy::big_endian::{U16, U32};

use crate::name::{ExportName, NameError};

/// Why an option's data makes no sense.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum OptionError {
    #[error("the option's data ends too early")]
    Truncated,
    #[error("the option's data goes on after its end")]
    Trailing,
    #[error("the option takes no data")]
    NotEmpty,
    #[error(transparent)]
    Name(#[from] NameError),
    #[error("a query must be UTF-8")]
    QueryNotUtf8,
    #[error("a query must start with a namespace")]
    QueryWithoutNamespace,
}

/// Data of `NBD_OPT_INFO` and `NBD_OPT_GO`.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct InfoRequest {
    pub(crate) name: ExportName,
    /// Information types asked for, in the order asked.
    pub(crate) wanted: Vec<u16>,
}

/// Data of `NBD_OPT_LIST_META_CONTEXT` and `NBD_OPT_SET_META_CONTEXT`.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct ContextRequest {
    pub(crate) name: ExportName,
    pub(crate) queries: Vec<String>,
}

/// Takes fields off the front.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn u16(&mut self) -> Result<u16, OptionError> {
        let (value, rest) = U16::ref_from_prefix(self.0).map_err(|_| OptionError::Truncated)?;
        self.0 = rest;
        Ok(value.get())
    }

    fn u32(&mut self) -> Result<u32, OptionError> {
        let (value, rest) = U32::ref_from_prefix(self.0).map_err(|_| OptionError::Truncated)?;
        self.0 = rest;
        Ok(value.get())
    }

    /// A 32-bit length and that many bytes.
    fn string(&mut self) -> Result<&'a [u8], OptionError> {
        let length = self.u32()? as usize;
        let (string, rest) = self.0.split_at_checked(length).ok_or(OptionError::Truncated)?;
        self.0 = rest;
        Ok(string)
    }

    fn end(&self) -> Result<(), OptionError> {
        if self.0.is_empty() { Ok(()) } else { Err(OptionError::Trailing) }
    }
}

impl InfoRequest {
    pub(crate) fn parse(data: &[u8]) -> Result<InfoRequest, OptionError> {
        let mut fields = Fields(data);
        let name = ExportName::from_wire(fields.string()?)?;
        let count = fields.u16()?;
        let mut wanted = Vec::new(); // grows as fields are found, not as the count promises
        for _ in 0..count {
            wanted.push(fields.u16()?);
        }
        fields.end()?;
        Ok(InfoRequest { name, wanted })
    }
}

impl ContextRequest {
    pub(crate) fn parse(data: &[u8]) -> Result<ContextRequest, OptionError> {
        let mut fields = Fields(data);
        let name = ExportName::from_wire(fields.string()?)?;
        let count = fields.u32()?;
        let mut queries = Vec::new();
        for _ in 0..count {
            let query = std::str::from_utf8(fields.string()?).map_err(|_| OptionError::QueryNotUtf8)?;
            if !query.contains(':') {
                return Err(OptionError::QueryWithoutNamespace);
            }
            queries.push(query.to_owned());
        }
        fields.end()?;
        Ok(ContextRequest { name, queries })
    }

    /// Whether one of the queries lists this context: by its name, or by its namespace alone.
    pub(crate) fn lists(&self, context: &str) -> bool {
        let in_namespace = |query: &str| query.ends_with(':') && context.starts_with(query);
        self.queries.is_empty() || self.queries.iter().any(|query| query == context || in_namespace(query))
    }

    /// Whether one of the queries selects this context: by its whole name only.
    pub(crate) fn selects(&self, context: &str) -> bool {
        self.queries.iter().any(|query| query == context)
    }
}

/// For options without data.
pub(crate) fn no_data(data: &[u8]) -> Result<(), OptionError> {
    if data.is_empty() { Ok(()) } else { Err(OptionError::NotEmpty) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn information_requests_are_read_and_bad_lengths_refused() {
        let good = InfoRequest::parse(b"\0\0\0\x02hi\0\x02\0\x01\0\x03").expect("well formed");
        assert_eq!((good.name.as_str(), good.wanted.as_slice()), ("hi", &[1, 3][..]));
        let bad: [(&[u8], OptionError); 5] = [
            (b"", OptionError::Truncated),
            (b"\xff\xff\xff\xffhi\0\0", OptionError::Truncated),
            (b"\0\0\0\x02hi\xff\xff", OptionError::Truncated),
            (b"\0\0\0\x02hi\0\0x", OptionError::Trailing),
            (b"\0\0\0\x02\xc3\x28\0\0", OptionError::Name(NameError::NotUtf8)),
        ];
        for (data, error) in bad {
            assert_eq!(InfoRequest::parse(data), Err(error), "{data:?}");
        }
    }

    #[test]
    fn a_huge_query_count_costs_nothing() {
        assert_eq!(ContextRequest::parse(b"\0\0\0\0\xff\xff\xff\xff"), Err(OptionError::Truncated));
    }

    #[test]
    fn listing_takes_namespaces_and_selecting_takes_names() {
        let data = b"\0\0\0\0\0\0\0\x01\0\0\0\x05base:";
        let request = ContextRequest::parse(data).expect("well formed");
        assert!(request.lists("base:allocation") && !request.lists("lifeboat:changed"));
        assert!(!request.selects("base:allocation"));
        let all = ContextRequest::parse(b"\0\0\0\0\0\0\0\0").expect("well formed");
        assert!(all.lists("lifeboat:changed") && !all.selects("lifeboat:changed"));
        assert_eq!(ContextRequest::parse(b"\0\0\0\0\0\0\0\x01\0\0\0\x04base"), Err(OptionError::QueryWithoutNamespace));
    }
}
