use std::path::PathBuf;

use super::*;

fn smollm() -> TextTokenizer {
    let path = crate::testing::model_file();
    TextTokenizer::from_gguf(&Gguf::open(&path).unwrap()).unwrap()
}

/// The expected ids are those of llama.cpp with parsing of special tokens.
#[test]
fn smollm_splits_each_digit_even_after_white_space() {
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
fn incremental_decoding_returns_the_whole_text_in_complete_characters() {
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
fn a_tokenizer_with_more_tokens_than_the_model_is_rejected() {
    let error = smollm().check_against(100).unwrap_err().to_string();
    assert!(error.contains("49151") && error.contains("another model"), "{error}");
    smollm().check_against(49152).unwrap();
}

#[test]
fn an_invalid_or_missing_tokenizer_json_is_named_in_the_error() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), "{\"model\": 3}").unwrap();
    let error = TextTokenizer::from_directory(dir.path()).unwrap_err().to_string();
    assert!(error.contains("tokenizer.json"), "{error}");
    let missing = TextTokenizer::from_directory(&PathBuf::from("/nonexistent")).unwrap_err();
    assert!(missing.to_string().contains("/nonexistent"));
}
