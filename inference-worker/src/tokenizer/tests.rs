use std::path::PathBuf;

use super::*;

fn smollm() -> TextTokenizer {
    let path = crate::testing::model_file();
    TextTokenizer::from_gguf(&Gguf::open(&path).unwrap()).unwrap()
}

/// The ids are llama.cpp's, with special tokens parsed.
#[test]
fn digits_are_split_one_by_one_also_after_white_space() {
    let tokenizer = smollm();
    for (text, ids) in [
        ("12345 costs", vec![33, 34, 35, 36, 37, 3499]),
        ("in 2024, 100 items", vec![254, 216, 34, 32, 34, 36, 28, 216, 33, 32, 32, 3723]),
        ("price:  \n\n  7", vec![17517, 42, 256, 39892, 39]),
        ("x=1;\n\n\n   42", vec![104, 45, 33, 43, 13272, 36, 34]),
    ] {
        assert_eq!(tokenizer.encode(text, true).unwrap(), ids, "{text:?}");
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), text);
    }
}

#[test]
fn incremental_text_equals_whole_text() {
    let tokenizer = smollm();
    for text in ["Café – naïve 東京 😀 12345 costs $3.50;", "🏳️‍🌈 ok\n\n  x", "plain"] {
        let ids = tokenizer.encode(text, false).unwrap();
        let mut stream = Detokenizer::new(true);
        let mut out = String::new();
        for id in &ids {
            let piece = stream.push(&tokenizer, *id).unwrap();
            assert!(!piece.contains('\u{FFFD}'), "{text:?} was split inside a character: {piece:?}");
            out += &piece;
        }
        out += &stream.finish(&tokenizer).unwrap();
        assert_eq!(out, text);
    }
}

#[test]
fn a_tokenizer_of_a_larger_model_is_refused() {
    let error = smollm().check_against(100).unwrap_err().to_string();
    assert!(error.contains("49151") && error.contains("another model"), "{error}");
    smollm().check_against(49152).unwrap();
}

#[test]
fn a_broken_tokenizer_json_is_named() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), "{\"model\": 3}").unwrap();
    let error = TextTokenizer::from_folder(dir.path()).unwrap_err().to_string();
    assert!(error.contains("tokenizer.json"), "{error}");
    let missing = TextTokenizer::from_folder(&PathBuf::from("/nonexistent")).unwrap_err();
    assert!(missing.to_string().contains("/nonexistent"));
}
