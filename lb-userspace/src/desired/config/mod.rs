//! The configuration file: `[lbd]` (the daemon's own settings) and `[[service]]` (desired state).
//!
//! Input: text. Output: a [`File`], or every [`Problem`] in it with line, column and fix. Pure apart from
//! [`File::read`]. Called by `lbd` at start and on SIGHUP, and by `lbctl config`.

mod export;
pub mod keys;
mod options;
mod parse;
mod shared;

pub use export::export;
pub use options::{LogFormat, LogLevel, OnStop, Options, Settings, SettingsError};

pub use crate::desired::model::nearest;

use crate::desired::model::Desired;
use std::{fmt, path::Path};

/// A parsed file.
#[derive(Clone, Debug, Default)]
pub struct File {
    /// `[lbd]`.
    pub options: Options,
    /// `[[service]]`; none if the file has no such table, which is not the same as none wanted.
    pub desired: Option<Desired>,
    /// `revision`: the one that the services were made from, if the file says.
    pub revision: Option<u64>,
}

/// One thing that is wrong with a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Line and column, both from 1, where they are known.
    pub at: Option<(usize, usize)>,
    /// What is wrong, and what would be right.
    pub what: String,
}

/// Why a file was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It could not be read.
    #[error("cannot read {file}: {source}")]
    Read {
        /// File.
        file: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It was read, and has these problems.
    #[error("{}", Listing { file, problems })]
    Problems {
        /// File.
        file: String,
        /// In file order.
        problems: Vec<Problem>,
    },
}

/// `file:line:column: what`, a line each.
struct Listing<'a> {
    file: &'a str,
    problems: &'a [Problem],
}

impl fmt::Display for Listing<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, problem) in self.problems.iter().enumerate() {
            let newline = if i == 0 { "" } else { "\n" };
            match problem.at {
                Some((line, column)) => {
                    write!(f, "{newline}{}:{line}:{column}: {}", self.file, problem.what)?;
                }
                None => write!(f, "{newline}{}: {}", self.file, problem.what)?,
            }
        }
        Ok(())
    }
}

impl File {
    /// Reads and parses a file; `-` is standard input.
    ///
    /// # Errors
    /// It cannot be read, or it has problems.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let file =
            if path == Path::new("-") { "standard input".to_owned() } else { path.display().to_string() };
        let text = if path == Path::new("-") {
            std::io::read_to_string(std::io::stdin())
        } else {
            std::fs::read_to_string(path)
        };
        let text = text.map_err(|source| ConfigError::Read { file: file.clone(), source })?;
        Self::parse(&text).map_err(|problems| ConfigError::Problems { file, problems })
    }

    /// Parses a file's text.
    ///
    /// # Errors
    /// All problems found, in file order: the first of the syntax; if that is sound, all of keys and types;
    /// if those are too, all of the rules that a desired state must keep.
    pub fn parse(text: &str) -> Result<Self, Vec<Problem>> {
        parse::parse(text)
    }
}

#[cfg(test)]
mod tests;
