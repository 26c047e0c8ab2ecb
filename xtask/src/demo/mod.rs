//! `cargo xtask demo`: runs the load balancer with real clients and workers while
//! everything around it changes, and reports the result of every request.

use std::{
    path::PathBuf,
    process::{Command, exit},
    thread,
};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{SigSet, Signal};
use test_support::{
    bed::{self, Layout},
    llm::Program,
    stage::{Plan, Stage, UDP, WEB},
};

use crate::{setup, shell};

mod inference;
mod phases;
mod regions;
mod report;
mod traffic;

/// How to run the demo.
#[derive(clap::Args, Debug)]
pub struct Options {
    /// Also write the results to FILE as JSON.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Run two regions with BGP and etcd: overload, and failures of a worker, an ingress host, a region and etcd.
    #[arg(long)]
    regions: bool,
    /// Keep everything running afterwards, until Ctrl-C.
    #[arg(long)]
    keep: bool,
    /// Number of workers at the start; one more joins during the demo.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(3..=20))]
    workers: u8,
    /// Forwarding mode.
    #[arg(long, default_value = "ipip", value_parser = ["ipip", "gue"])]
    mode: String,
    /// Run without LLM workers, which need libtorch and a model.
    #[arg(long)]
    without_inference: bool,
    /// Path of the inference worker, passed by the unprivileged part.
    #[arg(long, hide = true, requires = "llm_model")]
    llm_worker: Option<PathBuf>,
    /// Path of the model.
    #[arg(long, hide = true)]
    llm_model: Option<PathBuf>,
    /// Path of a Python with OpenAI's client.
    #[arg(long, hide = true)]
    llm_python: Option<PathBuf>,
    /// Skip set-up and build: this is the part that runs as root.
    #[arg(long, hide = true)]
    prepared: bool,
}

/// Sets up, builds, runs the demo, reports, and cleans up.
pub fn run(options: &Options) -> Result<()> {
    // Fails early if the file cannot be written, and creates it as the calling user even if the rest runs as root.
    if let Some(path) = &options.report {
        std::fs::write(path, "").with_context(|| format!("cannot write {}", path.display()))?;
    }
    let mut tools = options.tools();
    if !options.prepared {
        setup::run(&setup::Options { inference: options.has_inference(), ..setup::Options::BALANCER })?;
        build()?;
        if options.has_inference() {
            tools = Some(inference::prepare()?);
        }
        if !shell::is_root() {
            return run_as_root(tools.as_ref());
        }
    }
    clean_up_on_signal()?;
    if options.regions { play_regions(options) } else { play(options, tools.as_ref()) }
}

impl Options {
    fn has_inference(&self) -> bool {
        !self.without_inference && !self.regions
    }

    /// Returns the tools that the unprivileged part passed.
    fn tools(&self) -> Option<inference::LlmTools> {
        let program = Program { worker: self.llm_worker.clone()?, model: self.llm_model.clone()? };
        Some(inference::LlmTools { program, python: self.llm_python.clone() })
    }
}

fn build() -> Result<()> {
    eprintln!("building lbd and lbctl");
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(shell::workspace()).args(["build", "--package", "lb-userspace", "--bins"]);
    let status = command.status().context("cannot start cargo")?;
    if !status.success() {
        bail!("the build failed");
    }
    Ok(())
}

/// Runs this command again as root, without the build.
fn run_as_root(tools: Option<&inference::LlmTools>) -> Result<()> {
    if shell::which("sudo").is_none() {
        bail!("the demo creates network namespaces: run it as root, or install sudo");
    }
    let own = std::env::current_exe().context("cannot find the running program")?;
    let mut command = shell::as_root(own);
    command.args(std::env::args_os().skip(1)).arg("--prepared");
    if let Some(tools) = tools {
        command.arg("--llm-worker").arg(&tools.program.worker);
        command.arg("--llm-model").arg(&tools.program.model);
        if let Some(python) = &tools.python {
            command.arg("--llm-python").arg(python);
        }
    }
    let status = command.status().context("cannot start sudo")?;
    if !status.success() {
        bail!("the demo failed: {status}");
    }
    Ok(())
}

/// Starts a thread that handles SIGINT and SIGTERM by removing the test beds and
/// ending the process; other threads block these signals.
fn clean_up_on_signal() -> Result<()> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    signals.thread_block().context("cannot block signals")?;
    thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            let signal = signals.wait();
            eprintln!("\ncleaning up");
            bed::clean_own();
            exit(signal.map_or(1, |signal| 128 + signal as i32));
        })
        .context("cannot start a thread")?;
    Ok(())
}

fn play_regions(options: &Options) -> Result<()> {
    let story = regions::play(options.report.as_deref())?;
    if options.keep {
        let (world, host) = (story.world(), &story.world().regions[0].hosts[0]);
        println!("\nEverything stays up until Ctrl-C. In another terminal, as root:");
        let client = world.bed.client.path();
        println!("  {:<16} nsenter --net={} curl -s http://{}/", "ask", client.display(), world.target());
        for (what, arguments) in [("see e1", &["status"][..]), ("drain e1", &["host", "drain"])] {
            println!("  {what:<16} {}", host.lbctl.shell(arguments));
        }
        // The signal thread ends the process.
        loop {
            thread::park();
        }
    }
    drop(story);
    println!("cleaned up");
    Ok(())
}

fn play(options: &Options, tools: Option<&inference::LlmTools>) -> Result<()> {
    let mode = if options.mode == "gue" { "gue" } else { "ipip" };
    println!(
        "\nA client, an ingress host and {} workers, each in its own network namespace:",
        options.workers
    );
    println!("  client ── eth0 [lbd ingress: XDP] w1 ── eth0 [lbd worker: XDP] nginx");
    println!("                                    w2 ── … ; replies go straight to the client");
    let mut stage = Stage::start(Plan {
        layout: Layout { workers: options.workers, ..Layout::default() },
        mode,
        offers: vec![WEB, UDP],
        ..Plan::default()
    })?;
    println!("\n$ lbctl config apply services.toml\n$ lbctl backend list");
    println!("{}", stage.lbctl.run(&["backend", "list"])?);

    let mut report = report::Report::default();
    phases::run_all(&mut stage, &mut report)?;
    let workers = tools.map(|tools| inference::run_all(&stage, tools, &mut report)).transpose()?;
    report.conclude();
    if let Some(path) = &options.report {
        report.write(path)?;
        println!("results written to {}", path.display());
    }
    if options.keep {
        print_commands(&stage, workers.is_some());
        // The signal thread ends the process.
        loop {
            thread::park();
        }
    }
    drop(workers);
    drop(stage);
    println!("cleaned up");
    if !report.ok {
        bail!("requests or connections were lost that should have survived: see the phases marked ✗");
    }
    Ok(())
}

fn print_commands(stage: &Stage, has_llm: bool) {
    let client = stage.bed.client.path();
    println!("\nEverything stays up until Ctrl-C. In another terminal, as root:");
    for (what, command) in [
        (
            "ask the service",
            format!("nsenter --net={} curl -s http://10.99.0.1/ http://[fd00:99::1]/", client.display()),
        ),
        ("load it", format!("nsenter --net={} wrk -t2 -c50 -d10 http://10.99.0.1/", client.display())),
        ("see it", stage.lbctl.shell(&["status"])),
        ("count", stage.lbctl.shell(&["stats", "--watch"])),
        ("drain", stage.lbctl.shell(&["backend", "drain", "web", "w1"])),
        ("ask why", stage.lbctl.shell(&["explain", "10.0.0.2:40000", "10.99.0.1:80", "tcp"])),
    ] {
        println!("  {what:<16} {command}");
    }
    if has_llm {
        let body =
            r#"{"model": "smol", "stream": true, "messages": [{"role": "user", "content": "Hello!"}]}"#;
        let client = client.display();
        let url = "http://10.99.0.1:8000/v1/chat/completions";
        println!("  {:<16} nsenter --net={client} curl -N {url} -d '{body}'", "chat");
    }
}
