//! Programs that are told of drills and of recoveries as they change, one event after the other.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

use super::policy::HooksConfig;
use super::program;
use crate::app::App;
use crate::events::{Following, Happened, Topic};

/// How long a program may take where the configuration does not say it.
const DEADLINE: Duration = Duration::from_secs(60);

/// Tells programs what happens after event `told`, for as long as it is polled.
pub async fn run(app: Arc<App>, config: HooksConfig, mut told: u64) {
    if config.drill.is_none() && config.recovery.is_none() {
        return;
    }
    let mut newest = app.events.watch();
    let mut states = BTreeMap::new();
    loop {
        match app.events.after(told) {
            Following::All(events) => {
                for event in events {
                    told = event.number;
                    if is_new(&mut states, &event) {
                        tell(&config, &event).await;
                    }
                }
            }
            Following::Lost => {
                tracing::error!("hooks are too slow: some events are not told to them");
                told = app.events.newest();
            }
        }
        if newest.changed().await.is_err() {
            return;
        }
    }
}

/// Whether a hook is for it: drills are, and recoveries when their state is another.
fn is_new(states: &mut BTreeMap<String, String>, event: &Happened) -> bool {
    match event.topic {
        Topic::Job => false,
        Topic::Drill => true,
        Topic::Recovery => {
            let (name, state) = (text(&event.thing["name"]), text(&event.thing["state"]));
            match state.as_str() {
                // Its name may be used again.
                "discarded" => states.remove(&name).is_some(),
                _ => states.insert(name, state.clone()) != Some(state),
            }
        }
    }
}

async fn tell(config: &HooksConfig, event: &Happened) {
    let hook = if event.topic == Topic::Drill { &config.drill } else { &config.recovery };
    let Some(hook) = hook else { return };
    let what = format!("the hook on a {}", event.topic.name());
    let deadline = config.deadline.map_or(DEADLINE, |length| length.0);
    if let Err(problem) = program::run(&what, hook, &environment(event), &event.thing.to_string(), deadline).await {
        tracing::error!(%problem, "a hook failed");
    }
}

/// What a program is told in its environment. Not `LIFEBOAT_STATE` or any other that `lifeboat` itself understands.
fn environment(event: &Happened) -> Vec<(&'static str, String)> {
    let keys: &[(&str, &str)] = match event.topic {
        Topic::Drill => &[
            ("LIFEBOAT_DRILL", "id"),
            ("LIFEBOAT_RESULT", "result"),
            ("LIFEBOAT_REACHED", "stage"),
            ("LIFEBOAT_REASON", "reason"),
            ("LIFEBOAT_RTO_MS", "rto_ms"),
            ("LIFEBOAT_CONSOLE", "console"),
            ("LIFEBOAT_SCREENSHOT", "screenshot"),
        ],
        Topic::Recovery => {
            &[("LIFEBOAT_RECOVERY", "name"), ("LIFEBOAT_RECOVERY_STATE", "state"), ("LIFEBOAT_PROBLEM", "problem")]
        }
        Topic::Job => &[],
    };
    let both = [("LIFEBOAT_MACHINE", "machine"), ("LIFEBOAT_POINT", "point")];
    let told = keys.iter().chain(&both).map(|(name, key)| (*name, text(&event.thing[*key])));
    [("LIFEBOAT_EVENT", event.topic.name().to_owned())].into_iter().chain(told).collect()
}

fn text(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn event(topic: Topic, thing: Value) -> Happened {
        Happened { number: 1, topic, machine: None, thing }
    }

    #[test]
    fn a_hook_is_told_of_each_state_once_and_of_each_drill() {
        let mut states = BTreeMap::new();
        let mut new =
            |state: &str| is_new(&mut states, &event(Topic::Recovery, json!({ "name": "web01", "state": state })));
        assert!(new("publishing") && new("running") && !new("running") && new("discarding") && new("discarded"));
        assert!(!new("discarded") && new("publishing"));
        assert!(is_new(&mut states, &event(Topic::Drill, json!({}))));
        assert!(!is_new(&mut states, &event(Topic::Job, json!({}))));
    }

    #[test]
    fn a_hook_gets_what_happened_in_its_environment() {
        let drill = json!({ "machine": "web01", "result": "passed", "stage": "ready", "reason": null, "rto_ms": 4200 });
        let told = environment(&event(Topic::Drill, drill));
        for (name, value) in [("EVENT", "drill"), ("MACHINE", "web01"), ("RTO_MS", "4200"), ("REASON", "")] {
            assert!(told.iter().any(|(key, said)| key.ends_with(name) && said == value), "{name}: {told:?}");
        }
    }
}
