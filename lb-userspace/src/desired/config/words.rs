//! The messages of the TOML parser and of serde in the words of an operator.

/// Names of types in serde's messages, and what a file has there.
const TYPES: &[(&str, &str)] = &[
    ("a sequence", "a list: [..., ...]"),
    ("sequence", "a list: [..., ...]"),
    ("a map", "a table"),
    ("map", "a table"),
    ("a string", "a text in quotes"),
    ("string", "a text in quotes"),
    ("a boolean", "true or false"),
    ("bool", "true or false"),
    ("f64", "a number"),
    ("f32", "a number"),
];

/// Largest values of the number types.
const NUMBERS: &[(&str, i128, i128)] = &[
    ("u8", 0, u8::MAX as i128),
    ("u16", 0, u16::MAX as i128),
    ("u32", 0, u32::MAX as i128),
    ("u64", 0, u64::MAX as i128),
    ("usize", 0, u64::MAX as i128),
    ("i64", i64::MIN as i128, i64::MAX as i128),
];

/// What serde expects.
fn expected(text: &str) -> String {
    if let Some((_, least, most)) = NUMBERS.iter().find(|(name, ..)| *name == text) {
        return format!("a whole number from {least} to {most}, without quotes");
    }
    let plain = TYPES.iter().find(|(name, _)| *name == text).map(|(_, plain)| (*plain).to_owned());
    plain.unwrap_or_else(|| {
        let is_struct = text.starts_with("struct ") || text.starts_with("internally tagged");
        if is_struct { "a table".to_owned() } else { text.to_owned() }
    })
}

/// What serde found: ``string "30s"`` or ``integer `70000` ``.
fn found(text: &str) -> String {
    let text = text.replace('`', "");
    let kinds = [("string ", "the text "), ("integer ", "the number "), ("floating point ", "the number ")];
    for (kind, plain) in kinds {
        if let Some(rest) = text.strip_prefix(kind) {
            return format!("{plain}{rest}");
        }
    }
    match text.as_str() {
        "sequence" => "a list".to_owned(),
        "map" => "a table".to_owned(),
        other => other.strip_prefix("boolean ").unwrap_or(other).to_owned(),
    }
}

/// The message about a value that cannot be read.
pub fn of_value(message: &str) -> String {
    let parts = |start: &str| message.strip_prefix(start)?.split_once(", expected ");
    if let Some((what, wanted)) = parts("invalid type: ") {
        return format!("found {}, expected {}", found(what), expected(wanted));
    }
    if let Some((what, wanted)) = parts("invalid value: ")
        && let Some((_, least, most)) = NUMBERS.iter().find(|(name, ..)| *name == wanted)
    {
        return format!(
            "{} is out of range: {least} to {most}",
            found(what).trim_start_matches("the number ")
        );
    }
    if let Some(rest) = message.strip_prefix("unknown variant `")
        && let Some((word, known)) = rest.split_once("`, expected ")
    {
        let known: Vec<&str> = known.split('`').skip(1).step_by(2).collect();
        let near = super::nearest(word, known.iter().copied());
        let near = near.map(|near| format!("; did you mean {near}?")).unwrap_or_default();
        return format!("{word:?} is not one of {}{near}", known.join(", "));
    }
    if message.starts_with("data did not match any variant of untagged enum") {
        return "the value has none of the possible forms: see docs/reference/settings.md".to_owned();
    }
    message.to_owned()
}

/// The message about a text that is not TOML.
pub fn syntax(message: &str) -> String {
    let Some((what, wanted)) = message.split_once(", expected ") else { return message.to_owned() };
    match (what, wanted.trim_matches('`')) {
        ("invalid basic string", "\"") => "the text is not closed: a \" is missing at its end".to_owned(),
        ("invalid literal string", "'") => "the text is not closed: a ' is missing at its end".to_owned(),
        ("string values must be quoted", _) => "a text must be in quotes: \"...\"".to_owned(),
        ("unclosed array", _) => "the list is not closed: a ] is missing".to_owned(),
        ("unclosed table", _) => "the heading is not closed: a ] is missing".to_owned(),
        ("unclosed inline table", _) => "the table is not closed: a } is missing".to_owned(),
        ("key with no value", _) => "the key has no value: write KEY = VALUE".to_owned(),
        _ => message.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn serdes_words_become_an_operators() {
        for (message, plain) in [
            (
                "invalid type: string \"30s\", expected u32",
                "found the text \"30s\", expected a whole number from 0 to 4294967295, without quotes",
            ),
            ("invalid value: integer `-1`, expected u32", "-1 is out of range: 0 to 4294967295"),
            (
                "invalid type: string \"eth0\", expected a sequence",
                "found the text \"eth0\", expected a list: [..., ...]",
            ),
            ("invalid type: integer `5`, expected a boolean", "found the number 5, expected true or false"),
            (
                "unknown variant `geu`, expected one of `ipip`, `gue`",
                "\"geu\" is not one of ipip, gue; did you mean gue?",
            ),
            ("missing field `vip`", "missing field `vip`"),
        ] {
            assert_eq!(of_value(message), plain);
        }
        assert_eq!(
            syntax("invalid basic string, expected `\"`"),
            "the text is not closed: a \" is missing at its end"
        );
    }
}
