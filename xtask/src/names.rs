//! Rules for a crate's sources, as tests: one name per type, and files that can be read in one sitting.

use anyhow::{Context, Result};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};
use syn::visit::Visit;

/// Library sources whose rules are checked. Programs (`bin/`) are crates of their own.
const CRATES: [&str; 5] =
    ["lb-common/src", "lb-ebpf/src", "lb-userspace/src", "inference-worker/src", "xtask/src"];

/// Names that several modules of a crate may give to a type, each with the reason.
const SHARED_NAMES: [(&str, &str, &str); 1] =
    [("xtask/src", "Options", "arguments of the subcommand that the module is; written `bench::Options`")];

/// Lines that a file may have before its tests.
const FILE_LINES: usize = 500;

/// Longer files, each with the reason.
const LONG_FILES: [(&str, &str); 2] = [
    (
        "lb-ebpf/src/bin/ingress/tables.rs",
        "one method per operation on a map, none of which decides anything",
    ),
    ("lb-ebpf/src/native/tables.rs", "the same methods over hash maps, for tests and explain"),
];

/// Modules of tests: types of another ABI version for upgrade tests, and the simulation of regions.
const NOT_SHIPPED: [&str; 2] = ["other_abi", "simulation"];

/// Types that a file defines at module level, outside of tests.
#[derive(Default)]
struct Types(Vec<String>);

impl<'ast> Visit<'ast> for Types {
    fn visit_item_mod(&mut self, module: &'ast syn::ItemMod) {
        if !crate::rooms::is_test(&module.attrs) {
            syn::visit::visit_item_mod(self, module);
        }
    }

    // Types inside a function are local to it.
    fn visit_block(&mut self, _: &'ast syn::Block) {}

    fn visit_item_struct(&mut self, item: &'ast syn::ItemStruct) {
        self.0.push(item.ident.to_string());
    }

    fn visit_item_enum(&mut self, item: &'ast syn::ItemEnum) {
        self.0.push(item.ident.to_string());
    }

    fn visit_item_trait(&mut self, item: &'ast syn::ItemTrait) {
        self.0.push(item.ident.to_string());
    }

    fn visit_item_type(&mut self, item: &'ast syn::ItemType) {
        self.0.push(item.ident.to_string());
    }
}

/// A test's file, by its name.
fn is_test_file(path: &Path) -> bool {
    let name = path.file_stem().unwrap_or_default().to_string_lossy();
    name == "tests"
        || name.starts_with("tests_")
        || name.ends_with("_tests")
        || path.ends_with("bin")
        || NOT_SHIPPED.contains(&&*name)
}

/// Sources under a folder, without tests and programs.
fn sources(folder: &Path, into: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))? {
        let path = entry?.path();
        if is_test_file(&path) {
            continue;
        }
        if path.is_dir() {
            sources(&path, into)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            into.push(path);
        }
    }
    into.sort();
    Ok(())
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

/// Names of types that a crate defines more than once, with the files that define them.
fn twins(root: &Path, source: &str) -> Result<Vec<String>> {
    let mut files = Vec::new();
    sources(&root.join(source), &mut files)?;
    let mut places: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for file in &files {
        let parsed =
            syn::parse_file(&read(file)?).with_context(|| format!("cannot parse {}", file.display()))?;
        let mut types = Types::default();
        types.visit_file(&parsed);
        let inside = file.strip_prefix(root).unwrap_or(file).display().to_string();
        for name in types.0 {
            places.entry(name).or_default().push(inside.clone());
        }
    }
    let is_shared = |name: &str| SHARED_NAMES.iter().any(|(at, shared, _)| *at == source && *shared == name);
    let twins = places.into_iter().filter(|(name, files)| files.len() > 1 && !is_shared(name));
    Ok(twins.map(|(name, files)| format!("{name}: {}", files.join(", "))).collect())
}

/// Lines of a file before its tests.
fn lines(text: &str) -> usize {
    text.lines().take_while(|line| *line != "#[cfg(test)]").count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_types_of_a_crate_have_one_name() {
        let root = crate::shell::workspace();
        let all: Vec<String> = CRATES.iter().flat_map(|source| twins(&root, source).unwrap()).collect();
        assert_eq!(all, Vec::<String>::new(), "rename one of them, or give a reason in SHARED_NAMES");
    }

    #[test]
    fn no_file_is_longer_than_500_lines_before_its_tests() {
        let root = crate::shell::workspace();
        let mut files = Vec::new();
        for source in CRATES {
            sources(&root.join(source), &mut files).unwrap();
        }
        sources(&root.join("lb-ebpf/src/bin"), &mut files).unwrap();
        assert!(files.len() > 200, "{} files", files.len());
        let mut long = Vec::new();
        for file in &files {
            let inside = file.strip_prefix(&root).unwrap().display().to_string();
            let count = lines(&read(file).unwrap());
            let has_reason = LONG_FILES.iter().any(|(name, _)| *name == inside);
            if (count > FILE_LINES) != has_reason {
                long.push(format!("{inside}: {count} lines"));
            }
        }
        assert_eq!(long, Vec::<String>::new(), "split the file, or correct LONG_FILES");
    }

    #[test]
    fn twins_are_found_in_nested_modules_but_not_in_tests_and_functions() {
        let code = "struct A; mod inner { enum A {} } fn f() { struct B; } trait B { type C; } type C = u8;\n\
            #[cfg(test)] mod tests { struct C; }\n";
        let mut types = Types::default();
        types.visit_file(&syn::parse_file(code).unwrap());
        assert_eq!(types.0, ["A", "A", "B", "C"]);
    }
}
