//! `budget.txt`: a row for each program and setting, a column for each kernel.

use crate::Figures;
use anyhow::{Context, Result, bail};

/// The file, as it was when the suite was built.
pub const BUDGETS: &str = include_str!("../budget.txt");
/// No budget is larger: half of what the kernel allows (BPF_COMPLEXITY_LIMIT_INSNS) is kept free.
pub const LIMIT: u32 = 500_000;

/// Budgets in verified instructions.
#[derive(Clone, Debug)]
pub struct Budgets {
    /// Kernels, oldest first, as `MAJOR.MINOR`.
    pub columns: Vec<String>,
    rows: Vec<(String, Vec<u32>)>,
}

impl Budgets {
    /// Reads the file's text.
    pub fn parse(text: &str) -> Result<Self> {
        let mut lines = text.lines().filter(|line| !line.starts_with('#') && !line.trim().is_empty());
        let head = lines
            .next()
            .and_then(|line| line.strip_prefix("kernel:"))
            .context("the first line names the kernels")?;
        let columns: Vec<String> = head.split_whitespace().map(str::to_owned).collect();
        let mut rows = Vec::new();
        for line in lines {
            let (name, numbers) = line.split_once(':').with_context(|| format!("{line}: no colon"))?;
            let numbers = numbers.split_whitespace().map(str::parse).collect::<Result<Vec<u32>, _>>();
            let numbers = numbers.with_context(|| format!("{line}: not numbers"))?;
            if numbers.len() != columns.len() {
                bail!("{line}: {} numbers for {} kernels", numbers.len(), columns.len());
            }
            rows.push((name.to_owned(), numbers));
        }
        Ok(Self { columns, rows })
    }

    /// The column for a kernel of this release: the newest that is not newer.
    pub fn column_of(&self, release: &str) -> Result<&str> {
        let wanted = version(release).with_context(|| format!("{release}: not a kernel's release"))?;
        let is_older = |column: &&String| version(column).is_some_and(|version| version <= wanted);
        let column = self.columns.iter().rev().find(is_older);
        Ok(column.with_context(|| format!("{release} is older than {}", self.columns.join(" ")))?)
    }

    /// The budget of a program and setting in a column.
    pub fn budget(&self, column: &str, name: &str) -> Option<u32> {
        let at = self.columns.iter().position(|known| known == column)?;
        self.rows.iter().find(|(known, _)| known == name).map(|(_, numbers)| numbers[at])
    }

    /// Rows that a budget over [`LIMIT`] is in.
    pub fn too_large(&self) -> Vec<&str> {
        let is_over = |(_, numbers): &&(String, Vec<u32>)| numbers.iter().any(|number| *number > LIMIT);
        self.rows.iter().filter(is_over).map(|(name, _)| name.as_str()).collect()
    }

    /// The file's `text` with new budgets in a column: what each program took and a third more for other compilers, in
    /// full thousands, but never more than [`LIMIT`].
    pub fn rewrite(&self, text: &str, column: &str, figures: &[Figures]) -> String {
        let mut rewritten = String::new();
        for line in text.lines() {
            let row = line.split_once(':').filter(|_| !line.starts_with('#'));
            let taken = row.and_then(|(name, _)| figures.iter().find(|figure| figure.name == name));
            let (Some((name, numbers)), Some(taken)) = (row, taken) else {
                rewritten += &format!("{line}\n");
                continue;
            };
            let budget = (taken.verified / 3 * 4).next_multiple_of(1_000).min(LIMIT).to_string();
            let numbers: Vec<&str> = numbers
                .split_whitespace()
                .zip(&self.columns)
                .map(|(number, known)| if known == column { budget.as_str() } else { number })
                .collect();
            rewritten += &format!("{name}: {}\n", numbers.join(" "));
        }
        rewritten
    }

    /// Compares figures with a column: a table for people, and what is wrong.
    pub fn compare(&self, column: &str, figures: &[Figures]) -> (String, Vec<String>) {
        let mut table =
            format!("{:>9} {:>9} {:>10} {:>8}  program\n", "verified", "budget", "translated", "jited");
        let mut wrong = Vec::new();
        for f in figures {
            let budget = self.budget(column, &f.name);
            let shown = budget.map_or("none".to_owned(), |budget| budget.to_string());
            table += &format!(
                "{:>9} {:>9} {:>10} {:>8}  {}\n",
                f.verified, shown, f.translated_bytes, f.jited_bytes, f.name
            );
            match budget {
                None => wrong.push(format!("{}: no budget for {column}; it takes {}", f.name, f.verified)),
                Some(budget) if f.verified > budget => wrong.push(format!(
                    "{}: the verifier of {column} walks {} instructions, {} more than its budget of {budget}",
                    f.name,
                    f.verified,
                    f.verified - budget
                )),
                Some(_) => {}
            }
        }
        (table, wrong)
    }
}

/// The first two numbers of a release.
fn version(release: &str) -> Option<(u32, u32)> {
    let (major, rest) = release.trim().split_once('.')?;
    let minor: String = rest.chars().take_while(char::is_ascii_digit).collect();
    Some((major.parse().ok()?, minor.parse().ok()?))
}
