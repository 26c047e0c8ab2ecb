//! Renders chat messages to a prompt with the model's Jinja template.
//!
//! Input: messages, and a template from the GGUF file or `tokenizer_config.json`. Output: the text of the prompt.
//! Called by the chat endpoint and by `/tokenize`. Templates are written for Python's Jinja; minijinja-contrib
//! provides Python's string and list methods.

use minijinja::{Environment, Error, ErrorKind, Value, context};
use serde::Serialize;

/// The ChatML template, for models without a template.
pub const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// A parsed chat template.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    env: Environment<'static>,
    bos: String,
    eos: String,
}

/// Why a template cannot be parsed or rendered.
#[derive(Debug, thiserror::Error)]
pub enum ChatTemplateError {
    /// The template is not valid.
    #[error("the model's chat template is not valid: {0}")]
    Template(#[source] Error),
    /// The template cannot render these messages.
    #[error("the model's chat template cannot render the messages: {0}")]
    Messages(String),
}

impl ChatTemplate {
    /// Parses `source`.
    pub fn new(source: &str, bos: &str, eos: &str) -> Result<Self, ChatTemplateError> {
        let mut env = Environment::new();
        env.set_trim_blocks(true);
        env.set_lstrip_blocks(true);
        // A template is part of a downloaded model, so its cost is limited.
        env.set_recursion_limit(64);
        env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        env.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        env.add_function("strftime_now", |format: String| format_today(&format));
        env.add_template_owned("chat", source.to_owned()).map_err(ChatTemplateError::Template)?;
        Ok(Self { env, bos: bos.into(), eos: eos.into() })
    }

    /// Renders the prompt for `messages`. `generate` adds the beginning of the assistant's message.
    pub fn render<M: Serialize, T: Serialize>(
        &self,
        messages: &[M],
        tools: Option<&T>,
        generate: bool,
    ) -> Result<String, ChatTemplateError> {
        let template = self.env.get_template("chat").map_err(ChatTemplateError::Template)?;
        template
            .render(context! {
                messages => Value::from_serialize(messages),
                tools => tools.map(Value::from_serialize),
                add_generation_prompt => generate,
                bos_token => self.bos,
                eos_token => self.eos,
            })
            .map_err(|e| ChatTemplateError::Messages(e.detail().map_or_else(|| e.to_string(), str::to_owned)))
    }
}

/// Formats today's date (UTC). Supports the directives that chat templates use: %d, %m, %Y, %b and %B.
fn format_today(format: &str) -> String {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let (year, month, day) = civil_from_days(now.as_secs() / 86_400);
    let name = MONTHS[month as usize - 1];
    format
        .replace("%d", &format!("{day:02}"))
        .replace("%m", &format!("{month:02}"))
        .replace("%Y", &year.to_string())
        .replace("%b", &name[..3])
        .replace("%B", name)
}

/// Converts days since 1970-01-01 to (year, month, day), after Howard Hinnant's `civil_from_days`.
fn civil_from_days(days: u64) -> (u64, u64, u64) {
    let z = days + 719_468;
    let (era, doe) = (z / 146_097, z % 146_097);
    let yoe = (doe - doe / 1_460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    (yoe + era * 400 + u64::from(month <= 2), month, doy - (153 * mp + 2) / 5 + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value as Json, json};

    fn render(template: &str, messages: &[Json]) -> Result<String, ChatTemplateError> {
        ChatTemplate::new(template, "<s>", "</s>")?.render(messages, None::<&Json>, true)
    }

    #[test]
    fn python_string_methods_and_raise_exception_work_in_templates() {
        let template = "{{ bos_token }}{% for m in messages %}{% if m['role'] not in ['user'] %}\
                        {{ raise_exception('Only user role!') }}{% endif %}[{{ m['content'].strip().upper() }}]{% endfor %}";
        assert_eq!(render(template, &[json!({"role": "user", "content": " hi "})]).unwrap(), "<s>[HI]");
        let error = render(template, &[json!({"role": "tool", "content": ""})]).unwrap_err();
        assert!(error.to_string().contains("Only user role!"), "{error}");
    }

    #[test]
    fn an_invalid_template_is_rejected_when_parsed() {
        assert!(matches!(ChatTemplate::new("{% for %}", "", ""), Err(ChatTemplateError::Template(_))));
    }

    #[test]
    fn chatml_renders_messages_and_the_beginning_of_the_answer() {
        let out = render(CHATML, &[json!({"role": "user", "content": "a"})]).unwrap();
        assert_eq!(out, "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n");
    }

    #[test]
    fn days_since_1970_become_calendar_dates() {
        assert_eq!(civil_from_days(0), (1970, 1, 1));
        assert_eq!(civil_from_days(19_782), (2024, 2, 29));
        assert_eq!(civil_from_days(20_453), (2025, 12, 31));
    }
}
