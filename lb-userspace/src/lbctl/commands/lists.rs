//! Flags of commands that list something: order, choice, and repetition.

use super::{Context, Exit, Failure};
use crate::lbctl::{
    client::ClientError,
    render::{order::RowOrder, units::parse_duration},
};
use clap::Args;
use std::{io::IsTerminal, time::Duration};

/// Flags of commands that can be repeated.
#[derive(Clone, Debug, Default, Args)]
pub struct WatchFlags {
    /// Print again every SECONDS (default 2; 500ms and 1m are understood too), until interrupted
    #[arg(short, long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "2", value_parser = seconds)]
    watch: Option<Duration>,
    /// With --watch: stop after this many prints
    #[arg(long, value_name = "N", requires = "watch")]
    count: Option<u64>,
}

/// Flags of commands that print one table.
#[derive(Clone, Debug, Default, Args)]
pub struct ListFlags {
    #[command(flatten)]
    watch: WatchFlags,
    /// Sort by this column: numbers the largest first, texts by the alphabet; -COLUMN reverses
    #[arg(long, value_name = "COLUMN", allow_hyphen_values = true)]
    sort: Option<String>,
    /// Print only rows that contain this text
    #[arg(long, value_name = "TEXT")]
    filter: Option<String>,
}

/// Parses a number of seconds, or a duration with a unit.
fn seconds(text: &str) -> Result<Duration, String> {
    let parsed = match text.parse::<f64>() {
        Ok(seconds) if (0.001..=86_400.0).contains(&seconds) => Ok(Duration::from_secs_f64(seconds)),
        Ok(_) => Err(()),
        Err(_) => parse_duration(text).map_err(drop),
    };
    parsed.map_err(|()| "give a number of seconds, or a duration such as 500ms or 1m".to_owned())
}

impl Context<'_> {
    /// Runs a command, again and again if the flags say so. While it is repeated, an lbd that does not answer is waited
    /// for.
    pub async fn repeat(
        &mut self,
        flags: &WatchFlags,
        mut command: impl AsyncFnMut(&mut Self) -> Result<Exit, Failure>,
    ) -> Result<Exit, Failure> {
        let Some(interval) = flags.watch else { return command(self).await };
        let mut printed = 0;
        loop {
            if std::io::stdout().is_terminal() && !self.out.json {
                // Cursor home, clear screen.
                self.out.raw(b"\x1b[H\x1b[2J")?;
            }
            let exit = match command(self).await {
                Ok(exit) => exit,
                Err(Failure::Client(error @ ClientError::Unreachable { .. })) if printed > 0 => {
                    say!("{error}");
                    Exit::Unreachable
                }
                Err(failure) => return Err(failure),
            };
            self.out.flush()?;
            printed += 1;
            if flags.count.is_some_and(|count| printed >= count) {
                return Ok(exit);
            }
            tokio::select! {
                () = tokio::time::sleep(interval) => {}
                _ = tokio::signal::ctrl_c() => return Ok(exit),
            }
        }
    }

    /// Runs a command that prints one table, in the order that the flags ask for.
    pub async fn list(
        &mut self,
        flags: &ListFlags,
        command: impl AsyncFnMut(&mut Self) -> Result<Exit, Failure>,
    ) -> Result<Exit, Failure> {
        let ListFlags { watch, sort, filter } = flags.clone();
        if self.out.json && (sort.is_some() || filter.is_some()) {
            let what = "--sort and --filter are for tables: leave out -o".to_owned();
            return Err(Failure::Usage { what });
        }
        self.out.order = RowOrder { sort, filter };
        self.repeat(&watch, command).await
    }
}
