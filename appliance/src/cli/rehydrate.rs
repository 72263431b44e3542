//! `rehydrate` and `cutover`.

use std::time::Duration;

use axum::http::Method;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::args::{Global, Name, Rehydrate};
use super::client::segment;
use super::connect::{Door, NOTHING};
use super::{recover, render};
use crate::problem::Problem;
use crate::recovery::{Order, RecoveryView, State};
use crate::rehydrate::{Mode, RehydrateRequest, parse_target};
use crate::signals::stop_signal;

/// How often progress is asked for.
const LOOK: Duration = Duration::from_millis(250);

pub async fn run(door: &Door, global: &Global, args: &Rehydrate) -> Result<(), Problem> {
    let path = format!("/api/v1/recoveries/{}/rehydration", segment(&args.name));
    let order = [(args.pause, Order::Pause), (args.resume, Order::Resume), (args.cancel, Order::Cancel)];
    let order = order.into_iter().find_map(|(given, order)| given.then_some(order));
    let view: RecoveryView = match order {
        Some(order) => door.client.call(Method::PATCH, &path, Some(&order)).await?,
        None => {
            let request = RehydrateRequest {
                targets: args.to.iter().map(|text| parse_target(text)).collect::<Result<_, _>>()?,
                mode: match args.mode.as_deref() {
                    None => None,
                    Some("stream") => Some(Mode::Stream),
                    Some("mirror") => Some(Mode::Mirror),
                    Some(other) => return Err(Problem::usage(format!("there is no mode `{other}`"))),
                },
                format: args.format.clone(),
                limit: args.limit,
                overwrite: args.overwrite,
            };
            door.client.call(Method::POST, &path, Some(&request)).await?
        }
    };
    let follow = !args.detach && matches!(order, None | Some(Order::Resume));
    let view = if follow { wait_until_ready(door, view).await? } else { view };
    if global.json {
        render::json(&view);
    } else {
        recover::describe(&view);
        if view.state == State::ReadyForCutover {
            let name = &view.name;
            render::line("");
            render::line(&format!(
                "everything is on production storage: `lifeboat cutover {name}` moves the guest there"
            ));
        }
    }
    match &view.problem {
        Some(why) if follow && order.is_none() && view.state == State::Rehydrating => {
            Err(Problem::new(crate::problem::Kind::Failed, format!("the rehydration of {} is held: {why}", view.name))
                .hint(format!(
                    "its guest runs on; when the cause is gone: `lifeboat rehydrate {} --resume`",
                    view.name
                )))
        }
        _ => Ok(()),
    }
}

/// Shows how far it is until all is copied, it is held, or the user has seen enough; the copying goes on by itself.
async fn wait_until_ready(door: &Door, mut view: RecoveryView) -> Result<RecoveryView, Problem> {
    let total: u64 = view.disks.iter().map(|disk| disk.size).sum();
    let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
    let style = ProgressStyle::with_template("{msg} [{bar:30}] {binary_bytes} of {binary_total_bytes}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    while view.state == State::Rehydrating {
        let Some(rehydration) = &view.rehydration else { break };
        if rehydration.phase == "held" {
            break;
        }
        bar.set_position(view.disks.iter().map(|disk| disk.hydrated).sum());
        bar.set_message(format!("{}/s", render::bytes(rehydration.rate)));
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {}
            () = stop_signal() => {
                render::note(&format!("the rehydration of {} goes on", view.name));
                break;
            }
        }
        view = recover::get(door, &view.name).await?;
    }
    bar.finish_and_clear();
    Ok(view)
}

pub async fn cut_over(door: &Door, global: &Global, args: &Name) -> Result<(), Problem> {
    let path = format!("/api/v1/recoveries/{}/cutover", segment(&args.name));
    let view: RecoveryView = door.client.call(Method::POST, &path, NOTHING).await?;
    if global.json {
        render::json(&view);
        return Ok(());
    }
    recover::describe(&view);
    render::line("");
    let pause = view.timings.cutover_pause_ms.unwrap_or_default();
    render::line(&format!("{} is on production storage; its disks were held for {pause} ms", view.name));
    Ok(())
}
