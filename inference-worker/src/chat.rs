//! Chat messages to a prompt, by the model's own Jinja template.
//!
//! Input: messages and a template from the GGUF or `tokenizer_config.json`. Output: the prompt's text.
//! Called by the chat endpoint and by `/tokenize`. Templates are written for Python's Jinja: Python's
//! string and list methods come from minijinja-contrib.

use minijinja::{Environment, Error, ErrorKind, Value, context};
use serde::Serialize;

/// Used when a model brings no template: the ChatML layout.
pub const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// A parsed chat template.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    env: Environment<'static>,
    bos: String,
    eos: String,
}

/// Why a template was refused or did not render.
#[derive(Debug, thiserror::Error)]
pub enum ChatError {
    /// The template itself is broken.
    #[error("the model's chat template is broken: {0}")]
    Template(#[source] Error),
    /// The template refused these messages.
    #[error("the model's chat template refused the messages: {0}")]
    Messages(String),
}

impl ChatTemplate {
    /// Parses `source`.
    pub fn new(source: &str, bos: &str, eos: &str) -> Result<Self, ChatError> {
        let mut env = Environment::new();
        env.set_trim_blocks(true);
        env.set_lstrip_blocks(true);
        // A template comes with a model file: bound what a hostile one can burn.
        env.set_recursion_limit(64);
        env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        env.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        env.add_function("strftime_now", |format: String| today(&format));
        env.add_template_owned("chat", source.to_owned()).map_err(ChatError::Template)?;
        Ok(Self { env, bos: bos.into(), eos: eos.into() })
    }

    /// The prompt for `messages`; `generate` opens the assistant's turn.
    pub fn render<M: Serialize, T: Serialize>(
        &self,
        messages: &[M],
        tools: Option<&T>,
        generate: bool,
    ) -> Result<String, ChatError> {
        let template = self.env.get_template("chat").map_err(ChatError::Template)?;
        template
            .render(context! {
                messages => Value::from_serialize(messages),
                tools => tools.map(Value::from_serialize),
                add_generation_prompt => generate,
                bos_token => self.bos,
                eos_token => self.eos,
            })
            .map_err(|e| ChatError::Messages(e.detail().map_or_else(|| e.to_string(), str::to_owned)))
    }
}

/// Today's date (UTC) in the few directives that chat templates use.
fn today(format: &str) -> String {
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
    let (year, month, day) = civil(now.as_secs() / 86_400);
    let name = MONTHS[month as usize - 1];
    format
        .replace("%d", &format!("{day:02}"))
        .replace("%m", &format!("{month:02}"))
        .replace("%Y", &year.to_string())
        .replace("%b", &name[..3])
        .replace("%B", name)
}

/// Days since 1970-01-01 to (year, month, day), after Howard Hinnant's `civil_from_days`.
fn civil(days: u64) -> (u64, u64, u64) {
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

    fn render(template: &str, messages: &[Json]) -> Result<String, ChatError> {
        ChatTemplate::new(template, "<s>", "</s>")?.render(messages, None::<&Json>, true)
    }

    #[test]
    fn python_methods_and_errors_of_real_templates_work() {
        let template = "{{ bos_token }}{% for m in messages %}{% if m['role'] not in ['user'] %}\
                        {{ raise_exception('Only user role!') }}{% endif %}[{{ m['content'].strip().upper() }}]{% endfor %}";
        assert_eq!(render(template, &[json!({"role": "user", "content": " hi "})]).unwrap(), "<s>[HI]");
        let error = render(template, &[json!({"role": "tool", "content": ""})]).unwrap_err();
        assert!(error.to_string().contains("Only user role!"), "{error}");
    }

    #[test]
    fn a_broken_template_is_refused_when_loaded() {
        assert!(matches!(ChatTemplate::new("{% for %}", "", ""), Err(ChatError::Template(_))));
    }

    #[test]
    fn chatml_is_the_default() {
        let out = render(CHATML, &[json!({"role": "user", "content": "a"})]).unwrap();
        assert_eq!(out, "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n");
    }

    #[test]
    fn dates_are_civil() {
        assert_eq!(civil(0), (1970, 1, 1));
        assert_eq!(civil(19_782), (2024, 2, 29));
        assert_eq!(civil(20_453), (2025, 12, 31));
    }
}
