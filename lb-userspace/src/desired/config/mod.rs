//! The configuration file: `[lbd]` and `[[hook]]` (the daemon's own settings) and `[[service]]` (desired state).
//!
//! Input: text. Output: a [`File`], or every [`ConfigProblem`] in it with line, column and fix. Pure apart from
//! [`File::read`]. Called by `lbd` at start and on SIGHUP, and by `lbctl config`.

mod export;
mod hook;
pub mod keys;
mod options;
mod ownership;
mod parse;
mod resolve;
mod shared;
mod words;

pub use export::{export, export_without_seats};
pub use hook::Hook;
pub use options::{LogFormat, LogLevel, OnStop, Options};
pub use ownership::merge;
pub use resolve::{Settings, SettingsError};
pub use words::of_value as value_words;

pub use crate::desired::model::nearest;

use crate::desired::model::Desired;
use std::{fmt, path::Path};

/// A parsed file.
#[derive(Clone, Debug, Default)]
pub struct File {
    /// `[lbd]`.
    pub options: Options,
    /// `[[hook]]`.
    pub hooks: Vec<Hook>,
    /// `[[service]]` and `[[region]]`; none if the file has neither, which leaves the services as they are.
    pub desired: Option<Desired>,
    /// `revision`: revision of the desired state that the file was made from, if given.
    pub revision: Option<u64>,
}

/// One mistake in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigProblem {
    /// Line and column, both from 1, if known.
    pub at: Option<(usize, usize)>,
    /// What is wrong, and what would be right.
    pub what: String,
}

/// Why a file was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("cannot read {file}: {source}")]
    Read {
        /// Path of the file, or `standard input`.
        file: String,
        /// Error of the read.
        #[source]
        source: std::io::Error,
    },
    /// The file was read and has mistakes.
    #[error("{}", Listing { file, problems })]
    Problems {
        /// Path of the file, or `standard input`.
        file: String,
        /// All mistakes found, in file order.
        problems: Vec<ConfigProblem>,
    },
}

/// Prints each problem as a line `file:line:column: what`.
struct Listing<'a> {
    file: &'a str,
    problems: &'a [ConfigProblem],
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
    /// The file cannot be read, or has mistakes.
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

    /// Reads a file at the start of `lbd`. Mistakes in the services alone are returned beside the settings, so that a
    /// host can go on with the state that it has stored.
    ///
    /// # Errors
    /// The file cannot be read, or has mistakes elsewhere.
    pub fn read_leniently(path: &Path) -> Result<(Self, Option<ConfigError>), ConfigError> {
        let error = match Self::read(path) {
            Ok(file) => return Ok((file, None)),
            Err(error) => error,
        };
        let text = std::fs::read_to_string(path).unwrap_or_default();
        match parse::parse_settings(&text).filter(|_| matches!(error, ConfigError::Problems { .. })) {
            Some(settings) => Ok((settings, Some(error))),
            None => Err(error),
        }
    }

    /// Parses a file's text.
    ///
    /// # Errors
    /// Problems in file order: the first syntax error; if there is none, all wrong keys and types; if there are none,
    /// all violations of the rules for a desired state.
    pub fn parse(text: &str) -> Result<Self, Vec<ConfigProblem>> {
        parse::parse(text)
    }
}

#[cfg(test)]
mod tests;
