//! `cargo xtask rooms`: which room of the source imports which, and whether an import points upwards.
//!
//! A room is a top-level module of a crate. Each table below lists a crate's rooms from top to bottom; a room may
//! import the rooms below it only. Code under `#[cfg(test)]` is not counted.

use anyhow::{Context, Result, bail};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};
use syn::visit::Visit;

/// A crate and its rooms, from top to bottom. What is not listed lies below all rooms.
struct House {
    source: &'static str,
    rooms: &'static [&'static str],
}

const HOUSES: [House; 2] = [
    House {
        source: "lb-userspace/src",
        rooms: &["lbctl", "lbd", "serve", "apply", "observed", "plan", "desired"],
    },
    House {
        source: "lb-ebpf/src",
        rooms: &[
            "native",
            "kernel",
            "worker",
            "ingress",
            "quic",
            "nat",
            "icmp",
            "forward",
            "second_chance",
            "select",
            "guard",
            "packet",
        ],
    },
];

/// Modules whose results depend on their arguments only, and what they may therefore not use.
const PURE: [&str; 2] = ["lb-userspace/src/plan", "lb-userspace/src/desired/model"];
const IMPURE: [&str; 11] = [
    "tokio",
    "aya",
    "nix",
    "libc",
    "rand",
    "std::env",
    "std::fs",
    "std::process",
    "std::thread",
    "std::time::Instant",
    "std::time::SystemTime",
];

/// A use of one module by another: file and path.
type Import = (PathBuf, String);

/// Imports between the rooms of a crate: (from, to) → places.
type Imports = BTreeMap<(String, String), BTreeSet<Import>>;

/// Paths that one file names, and the modules that it declares.
#[derive(Default)]
struct Names {
    paths: BTreeSet<String>,
    modules: Vec<String>,
}

pub(crate) fn is_test(attributes: &[syn::Attribute]) -> bool {
    attributes.iter().any(|a| a.path().is_ident("cfg") && quoted(a).contains("test"))
}

fn quoted(attribute: &syn::Attribute) -> String {
    match &attribute.meta {
        syn::Meta::List(list) => list.tokens.to_string(),
        _ => String::new(),
    }
}

fn flatten(tree: &syn::UseTree, prefix: &str, into: &mut BTreeSet<String>) {
    let join =
        |name: &syn::Ident| if prefix.is_empty() { name.to_string() } else { format!("{prefix}::{name}") };
    match tree {
        syn::UseTree::Path(path) => flatten(&path.tree, &join(&path.ident), into),
        syn::UseTree::Name(name) => drop(into.insert(join(&name.ident))),
        syn::UseTree::Rename(name) => drop(into.insert(join(&name.ident))),
        syn::UseTree::Glob(_) => drop(into.insert(prefix.to_owned())),
        syn::UseTree::Group(group) => group.items.iter().for_each(|item| flatten(item, prefix, into)),
    }
}

impl<'ast> Visit<'ast> for Names {
    fn visit_item_mod(&mut self, module: &'ast syn::ItemMod) {
        if is_test(&module.attrs) {
            return;
        }
        if module.content.is_none() {
            self.modules.push(module.ident.to_string());
        }
        syn::visit::visit_item_mod(self, module);
    }

    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        if !is_test(&item.attrs) {
            flatten(&item.tree, "", &mut self.paths);
        }
    }

    fn visit_item_impl(&mut self, item: &'ast syn::ItemImpl) {
        if !is_test(&item.attrs) {
            syn::visit::visit_item_impl(self, item);
        }
    }

    fn visit_item_fn(&mut self, item: &'ast syn::ItemFn) {
        if !is_test(&item.attrs) {
            syn::visit::visit_item_fn(self, item);
        }
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let names: Vec<String> = path.segments.iter().map(|s| s.ident.to_string()).collect();
        self.paths.insert(names.join("::"));
        syn::visit::visit_path(self, path);
    }
}

/// Calls `f` for a module's file and for the files of the modules that it declares.
fn walk(file: &Path, children: &Path, f: &mut dyn FnMut(&Path, &BTreeSet<String>)) -> Result<()> {
    let text = fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    let parsed = syn::parse_file(&text).with_context(|| format!("cannot parse {}", file.display()))?;
    let mut names = Names::default();
    names.visit_file(&parsed);
    f(file, &names.paths);
    for module in &names.modules {
        let (flat, nested) = (children.join(format!("{module}.rs")), children.join(module));
        if flat.is_file() {
            walk(&flat, &nested, f)?;
        } else {
            walk(&nested.join("mod.rs"), &nested, f)?;
        }
    }
    Ok(())
}

/// Reads the imports between the rooms of a crate.
fn imports(root: &Path, house: &House) -> Result<Imports> {
    let source = root.join(house.source);
    let mut found = Imports::new();
    walk(&source.join("lib.rs"), &source, &mut |file, paths| {
        let inside = file.strip_prefix(&source).unwrap_or(file);
        let first = inside.components().next().map(|c| c.as_os_str().to_string_lossy().into_owned());
        let from = first.unwrap_or_default().trim_end_matches(".rs").to_owned();
        if !house.rooms.contains(&from.as_str()) {
            return;
        }
        for path in paths {
            let mut names = path.split("::");
            if names.next() == Some("crate")
                && let Some(to) = names.next().filter(|to| house.rooms.contains(to) && *to != from)
            {
                let place = (Path::new(house.source).join(inside), path.clone());
                found.entry((from.clone(), to.to_owned())).or_default().insert(place);
            }
        }
    })?;
    Ok(found)
}

/// Imports that point upwards, one line each.
fn upward(house: &House, imports: &Imports) -> Vec<String> {
    let place = |room: &str| house.rooms.iter().position(|r| *r == room);
    let wrong = imports.iter().filter(|((from, to), _)| place(to) < place(from));
    let lines = |(_, places): (_, &BTreeSet<Import>)| {
        let line = |(file, path): &Import| format!("{}: {path}", file.display());
        places.iter().map(line).collect::<Vec<_>>()
    };
    wrong.flat_map(lines).collect()
}

/// Uses of clocks, files, tasks and the kernel in modules that are pure, one line each.
fn impure(root: &Path) -> Result<Vec<String>> {
    let mut wrong = Vec::new();
    for module in PURE {
        let source = root.join(module);
        walk(&source.join("mod.rs"), &source, &mut |file, paths| {
            let is = |path: &str, name: &str| path == name || path.starts_with(&format!("{name}::"));
            let bad = paths.iter().filter(|path| IMPURE.iter().any(|name| is(path, name)));
            let file = file.strip_prefix(root).unwrap_or(file);
            wrong.extend(bad.map(|path| format!("{}: {path}", file.display())));
        })?;
    }
    Ok(wrong)
}

/// Prints how many imports each room has of each other one, and fails if one points upwards.
///
/// # Errors
/// A source file cannot be read, or an import breaks the rules.
pub fn run() -> Result<()> {
    let root = crate::shell::workspace();
    let mut wrong = impure(&root)?;
    for house in &HOUSES {
        println!("{}, from top to bottom", house.source);
        let all = imports(&root, house)?;
        for room in house.rooms {
            let of = |to: &&str| all.get(&((*room).to_owned(), (**to).to_owned())).map(BTreeSet::len);
            let uses: Vec<String> =
                house.rooms.iter().filter_map(|to| Some(format!("{to} {}", of(to)?))).collect();
            println!("  {room:<14} {}", if uses.is_empty() { "-".to_owned() } else { uses.join(", ") });
        }
        println!();
        wrong.extend(upward(house, &all));
    }
    if !wrong.is_empty() {
        bail!("imports that the rooms do not allow:\n  {}", wrong.join("\n  "));
    }
    println!("No import points upwards; plan and desired::model use no clock, task, file or kernel.");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_import_points_upwards() {
        for house in &HOUSES {
            let all = imports(&crate::shell::workspace(), house).unwrap();
            assert!(!all.is_empty(), "{} has imports", house.source);
            assert_eq!(upward(house, &all), Vec::<String>::new());
        }
    }

    #[test]
    fn pure_modules_use_no_clock_task_file_or_kernel() {
        assert_eq!(impure(&crate::shell::workspace()).unwrap(), Vec::<String>::new());
    }

    #[test]
    fn an_upward_import_is_found_in_every_form() {
        let code = "use crate::{desired::model, lbd::{self, args::Cli}};\n\
            fn f() -> crate::serve::Api { g::<crate::lbctl::X>() }\n\
            #[cfg(test)]\nmod tests { use crate::apply::Y; }\n";
        let mut names = Names::default();
        names.visit_file(&syn::parse_file(code).unwrap());
        for path in [
            "crate::desired::model",
            "crate::lbd::self",
            "crate::lbd::args::Cli",
            "crate::serve::Api",
            "crate::lbctl::X",
        ] {
            assert!(names.paths.contains(path), "{path} in {:?}", names.paths);
        }
        assert!(!names.paths.iter().any(|path| path.contains("apply")), "tests do not count");
    }
}
