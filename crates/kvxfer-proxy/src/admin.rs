//! `/admin/instances`: instances come, rest and go while the proxy runs. Behind a token, and closed without one.
//!
//! | request | what it does |
//! |---|---|
//! | `GET /admin/instances` | all of them, with health and load |
//! | `POST /admin/instances` | adds one: `{"role": "prefiller" \| "decoder", …}` with the keys of the file |
//! | `POST /admin/instances/{name}/drain` | no new requests; those under way go on |
//! | `POST /admin/instances/{name}/resume` | gets requests again |
//! | `DELETE /admin/instances/{name}` | drains it and forgets it with its last request |

use crate::config::{ConfigError, FileDecoder, FilePrefiller, Instance, Role};
use crate::openai::ApiError;
use crate::router::Admin;
use crate::server::App;
use crate::server::{bearer, error_response, json_response};
use axum::Router;
use axum::body::to_bytes;
use axum::extract::{Path, Request, State};
use axum::middleware::{self, Next};
use axum::response::Response;
use axum::routing::{delete, get, post};
use hyper::StatusCode;
use serde::Deserialize;
use std::sync::Arc;

/// Largest body.
const MAX_BODY: usize = 64 << 10;

pub(crate) fn routes(app: &Arc<App>) -> Router<Arc<App>> {
    Router::new()
        .route("/admin/instances", get(list).post(add))
        .route("/admin/instances/{name}", delete(remove))
        .route("/admin/instances/{name}/drain", post(drain))
        .route("/admin/instances/{name}/resume", post(resume))
        .route_layer(middleware::from_fn_with_state(Arc::clone(app), operator))
}

/// Lets in who has the token.
async fn operator(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let settings = app.settings();
    match (&settings.admin_token, bearer(request.headers())) {
        (None, _) => error_response(&ApiError::new(
            403,
            "The administration is closed; set an admin token (--admin-token or admin_token) to open it.",
        )),
        (Some(token), Some(given)) if token.matches(given) => next.run(request).await,
        (Some(_), _) => error_response(&ApiError::new(
            401,
            "The admin token is missing or not valid; send it as `Authorization: Bearer TOKEN`.",
        )),
    }
}

async fn list(State(app): State<Arc<App>>) -> Response {
    let view = app.with(|router, now| router.view(now));
    match serde_json::to_vec(&serde_json::json!({ "instances": view.instances })) {
        Ok(body) => json_response(StatusCode::OK, body),
        Err(e) => error_response(&ApiError::new(500, e.to_string())),
    }
}

/// An instance as the file writes it, with its role.
#[derive(Deserialize)]
#[serde(tag = "role", rename_all = "kebab-case")]
enum New {
    Prefiller(FilePrefiller),
    Decoder(FileDecoder),
}

async fn add(State(app): State<Arc<App>>, request: Request) -> Response {
    let bad = |text: String| error_response(&ApiError::new(400, text));
    let body = match to_bytes(request.into_body(), MAX_BODY).await {
        Ok(body) => body,
        Err(e) => return bad(format!("The body cannot be read: {e}.")),
    };
    let new: New = match serde_json::from_slice(&body) {
        Ok(new) => new,
        Err(e) => return bad(format!("This is no instance: {e}.")),
    };
    let kv = app.settings().kv;
    let added = app.with(|router, now| {
        let known = router.instances();
        // The first number that is free, should it have no name of its own.
        let free = |role: Role| {
            (1..=known.len() + 1)
                .find(|n| !known.iter().any(|(_, i)| i.name == format!("{role}{n}")))
                .unwrap_or(known.len() + 1)
        };
        let instance: Instance = match new {
            New::Prefiller(new) => new.instance(free(Role::Prefiller)),
            New::Decoder(new) => new.instance(free(Role::Decoder)),
        };
        instance.check()?;
        instance.check_path(kv)?;
        for (_, other) in &known {
            if other.name == instance.name {
                return Err(ConfigError::new("name", &instance.name, "there is an instance of this name"));
            }
            if other.role == instance.role && other.authority() == instance.authority() {
                return Err(ConfigError::new(
                    "port",
                    instance.authority(),
                    format!("{} is there", other.name),
                ));
            }
        }
        let name = instance.name.clone();
        let role = instance.role;
        router.add(now, instance);
        Ok((name, role))
    });
    match added {
        Ok((name, role)) => {
            if role == Role::Prefiller {
                app.stats.add_prefiller(&name);
            }
            app.probes.cover(&app);
            tracing::info!(name, "an instance was added");
            json_response(StatusCode::CREATED, serde_json::json!({ "name": name }).to_string())
        }
        Err(e) => bad(e.to_string()),
    }
}

async fn drain(State(app): State<Arc<App>>, Path(name): Path<String>) -> Response {
    set(&app, &name, Admin::Draining)
}

async fn resume(State(app): State<Arc<App>>, Path(name): Path<String>) -> Response {
    set(&app, &name, Admin::Active)
}

async fn remove(State(app): State<Arc<App>>, Path(name): Path<String>) -> Response {
    set(&app, &name, Admin::Removing)
}

fn set(app: &Arc<App>, name: &str, admin: Admin) -> Response {
    let left = app.with(|router, now| {
        let id = router.find(name)?;
        router.set_admin(now, id, admin);
        let view = router.view(now);
        Some(view.instances.iter().find(|i| i.id == id).map_or(0, |i| i.requests))
    });
    match left {
        Some(requests) => {
            tracing::info!(name, ?admin, requests, "an instance was changed");
            json_response(
                StatusCode::OK,
                serde_json::json!({ "name": name, "requests": requests }).to_string(),
            )
        }
        None => error_response(&ApiError::new(404, format!("There is no instance {name:?}."))),
    }
}
