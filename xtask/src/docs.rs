//! `cargo xtask docs`: generates the reference pages from the code, and builds the documentation site.
//!
//! `docs/reference/` is written by the tests of `lb-userspace/tests/reference.rs`, which otherwise compare it with
//! the code. mdBook builds the site from copies under `target/book`, so that links between documents work both in the
//! repository and on the site.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};

use crate::{setup, shell};

/// Version of mdBook that the site is built with.
const MDBOOK: &str = "0.4.52";

/// What to generate.
#[derive(clap::Args, Debug)]
pub struct Options {
    /// Also build the documentation site under target/book/html; installs mdBook under target/tools if needed.
    #[arg(long)]
    build: bool,
    /// Build the site and open it in a browser.
    #[arg(long)]
    open: bool,
}

/// Writes the reference pages and, if requested, builds the site.
pub fn run(options: &Options) -> Result<()> {
    setup::run(&setup::Options { bpf: true, ..setup::Options::default() })?;
    write_reference()?;
    if options.build || options.open {
        build_site(options.open)?;
    }
    Ok(())
}

fn cargo() -> Command {
    Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

fn write_reference() -> Result<()> {
    let mut command = cargo();
    command.current_dir(shell::workspace()).env("LB_WRITE_REFERENCE", "1");
    command.args(["test", "--quiet", "--package", "lb-userspace", "--test", "reference"]);
    let status = command.status().context("cannot start cargo")?;
    ensure!(status.success(), "cannot write the reference pages: see the messages above");
    println!("{}", shell::workspace().join("docs/reference").display());
    Ok(())
}

fn build_site(open: bool) -> Result<()> {
    let mdbook = mdbook()?;
    let book = shell::workspace().join("target/book");
    stage(&shell::workspace(), &book)?;
    let mut command = Command::new(mdbook);
    command.arg("build").arg(&book);
    if open {
        command.arg("--open");
    }
    let status = command.status().context("cannot start mdbook")?;
    ensure!(status.success(), "mdbook failed: {status}");
    println!("{}", book.join("html/index.html").display());
    Ok(())
}

/// Returns the path of mdBook, which is installed if it is missing.
fn mdbook() -> Result<PathBuf> {
    let root = shell::workspace().join("target/tools").join(format!("mdbook-{MDBOOK}"));
    let program = root.join("bin/mdbook");
    if !program.is_file() {
        let mut install = cargo();
        install.args(["install", "mdbook", "--version", MDBOOK, "--locked", "--no-default-features"]);
        install.args(["--features", "search", "--root"]).arg(&root);
        shell::with_progress(&format!("installing mdBook {MDBOOK}"), &mut install)?;
    }
    Ok(program)
}

/// Copies the sources of the site: documents, and the files that they link to.
fn stage(workspace: &Path, book: &Path) -> Result<()> {
    if book.exists() {
        fs::remove_dir_all(book).with_context(|| format!("cannot remove {}", book.display()))?;
    }
    let source = book.join("src");
    for directory in ["docs", "deploy"] {
        copy_tree(&workspace.join(directory), &source.join(directory))?;
    }
    for file in ["README.md", "ARCHITECTURE.md"] {
        fs::copy(workspace.join(file), source.join(file)).with_context(|| format!("cannot copy {file}"))?;
    }
    let moved = source.join("docs/SUMMARY.md");
    let summary = fs::read_to_string(&moved).with_context(|| format!("cannot read {}", moved.display()))?;
    fs::write(source.join("SUMMARY.md"), relocate_links(&summary)).context("cannot write SUMMARY.md")?;
    fs::remove_file(moved).context("cannot remove the copied SUMMARY.md")?;
    fs::rename(source.join("docs/book.toml"), book.join("book.toml")).context("cannot move book.toml")
}

fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).with_context(|| format!("cannot create {}", to.display()))?;
    for entry in fs::read_dir(from).with_context(|| format!("cannot read {}", from.display()))? {
        let path = entry.with_context(|| format!("cannot read {}", from.display()))?.path();
        let target = to.join(path.file_name().expect("a listed file has a name"));
        if path.is_dir() {
            copy_tree(&path, &target)?;
        } else {
            fs::copy(&path, &target).with_context(|| format!("cannot copy {}", path.display()))?;
        }
    }
    Ok(())
}

/// Rewrites the links of docs/SUMMARY.md for the directory above it.
fn relocate_links(summary: &str) -> String {
    summary.replace("](", "](docs/").replace("](docs/../", "](")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    /// Returns README, ARCHITECTURE and all documents under docs/.
    fn documents() -> Vec<PathBuf> {
        let mut found =
            vec![shell::workspace().join("README.md"), shell::workspace().join("ARCHITECTURE.md")];
        let mut open = vec![shell::workspace().join("docs")];
        while let Some(directory) = open.pop() {
            for entry in fs::read_dir(&directory).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    open.push(path);
                } else if path.extension().is_some_and(|extension| extension == "md") {
                    found.push(path);
                }
            }
        }
        found.sort();
        found
    }

    /// Returns the lines outside code blocks with their numbers, with code spans blanked.
    fn prose(text: &str) -> Vec<(usize, String)> {
        let mut is_code = false;
        let mut lines = Vec::new();
        for (number, line) in text.lines().enumerate() {
            if line.trim_start().starts_with("```") {
                is_code = !is_code;
            } else if !is_code {
                let parts = line.split('`').enumerate();
                let plain = parts.map(|(i, part)| if i % 2 == 0 { part } else { "" });
                lines.push((number + 1, plain.collect::<Vec<_>>().join("`")));
            }
        }
        lines
    }

    /// Returns the targets of the links `[text](target)` in a line.
    fn targets(line: &str) -> Vec<&str> {
        line.split("](").skip(1).filter_map(|rest| rest.split(')').next()).collect()
    }

    /// Returns the anchors of a document's headings, as GitHub and mdBook derive them.
    fn anchors(text: &str) -> BTreeSet<String> {
        let mut is_code = false;
        let mut found = BTreeSet::new();
        for line in text.lines() {
            if line.starts_with("```") {
                is_code = !is_code;
            }
            let title = line.trim_start_matches('#');
            if is_code || title.len() == line.len() || !title.starts_with(' ') {
                continue;
            }
            let title = title.trim().to_lowercase();
            let kept = title.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
            let anchor: String = kept.map(|c| if c == ' ' { '-' } else { c }).collect();
            let repeated = (1..).map(|n| format!("{anchor}-{n}"));
            let free = std::iter::once(anchor.clone()).chain(repeated).find(|a| !found.contains(a));
            found.insert(free.expect("there is always another number"));
        }
        found
    }

    fn broken(document: &Path, target: &str) -> Option<String> {
        if target.contains("://") || target.starts_with("mailto:") {
            return None;
        }
        let (path, anchor) = target.split_once('#').map_or((target, None), |(p, a)| (p, Some(a)));
        let file = match path {
            "" => document.to_owned(),
            path => document.parent().expect("a document has a parent directory").join(path),
        };
        if !file.exists() {
            return Some(format!("{path} does not exist"));
        }
        let anchor = anchor?;
        let text = fs::read_to_string(&file).unwrap_or_default();
        (!anchors(&text).contains(anchor)).then(|| format!("{} has no heading #{anchor}", file.display()))
    }

    #[test]
    fn every_link_in_the_documents_works() {
        let (mut wrong, mut links) = (Vec::new(), 0);
        for document in documents() {
            let text = fs::read_to_string(&document).unwrap();
            for (number, line) in prose(&text) {
                for target in targets(&line) {
                    links += 1;
                    let found = broken(&document, target);
                    wrong.extend(found.map(|what| format!("{}:{number}: {what}", document.display())));
                }
            }
        }
        assert!(wrong.is_empty(), "broken links:\n{}", wrong.join("\n"));
        assert!(links > 30, "only {links} links were found");
    }

    #[test]
    fn a_broken_link_is_found() {
        let readme = shell::workspace().join("README.md");
        assert!(broken(&readme, "docs/none.md").is_some_and(|what| what.contains("does not exist")));
        assert!(broken(&readme, "docs/testing.md#no-such").is_some_and(|what| what.contains("no heading")));
        assert_eq!(broken(&readme, "docs/testing.md#the-bed"), None);
        assert_eq!(targets("see [a](b.md) and ![c](d/e.svg)."), ["b.md", "d/e.svg"]);
        assert_eq!(
            prose("a `[x](y)` b\n```\n[p](q)\n```\nc"),
            [(1, "a `` b".to_owned()), (5, "c".to_owned())]
        );
    }

    #[test]
    fn the_site_has_every_document() {
        let docs = shell::workspace().join("docs");
        let summary = fs::read_to_string(docs.join("SUMMARY.md")).unwrap();
        let listed: BTreeSet<PathBuf> = summary
            .lines()
            .flat_map(targets)
            .map(|target| docs.join(target).canonicalize().unwrap_or_else(|e| panic!("{target}: {e}")))
            .collect();
        let all = documents().into_iter().map(|path| path.canonicalize().unwrap());
        let missing: Vec<_> =
            all.filter(|path| !path.ends_with("docs/SUMMARY.md") && !listed.contains(path)).collect();
        assert!(missing.is_empty(), "not in docs/SUMMARY.md: {missing:?}");
    }

    #[test]
    fn the_site_is_staged_with_working_links() {
        assert_eq!(relocate_links("- [a](a.md)\n- [b](../B.md)"), "- [a](docs/a.md)\n- [b](B.md)");
        let directory = env::temp_dir().join(format!("lb-book-{}", std::process::id()));
        stage(&shell::workspace(), &directory).unwrap();
        let summary = fs::read_to_string(directory.join("src/SUMMARY.md")).unwrap();
        for target in summary.lines().flat_map(targets) {
            assert!(directory.join("src").join(target).is_file(), "{target}");
        }
        assert!(directory.join("book.toml").is_file());
        fs::remove_dir_all(&directory).unwrap();
    }
}
