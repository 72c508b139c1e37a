"""`jet-export serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jet_export.cli.options import Bundle, Deterministic, Draft, Drafts, Speculate, TrustedKey, parse_bytes
from jet_export.utils.errors import JetExportError


def serve(
    bundle: Bundle,
    openai: Annotated[
        bool, typer.Option("--openai", help="Serve an OpenAI-compatible HTTP endpoint, without Triton.")
    ] = False,
    triton_repo: Annotated[Path | None, typer.Option(help="Only write a Triton model repository here.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the model in --triton-repo.")] = False,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="With --openai; 0 picks a free one.")] = 8000,
    http_port: Annotated[int, typer.Option(help="Triton's HTTP; 0 picks a free one.")] = 8000,
    grpc_port: Annotated[int, typer.Option(help="Triton's gRPC; 0 picks a free one.")] = 8001,
    metrics_port: Annotated[int, typer.Option(help="Triton's metrics; 0 picks a free one.")] = 8002,
    instances: Annotated[int, typer.Option(help="Engines behind Triton, on the CPU or on each of --gpus.")] = 1,
    gpus: Annotated[str, typer.Option(help="GPUs that Triton uses, such as 0,1.")] = "0",
    keep_alive_timeout: Annotated[
        float, typer.Option(help="With --openai: seconds that an idle connection stays open.")
    ] = 75.0,
    frontends: Annotated[
        int | None,
        typer.Option(
            help="With --openai: processes for HTTP and text beside the engine's; 0: none. "
            "Default: 0 on a CPU, else up to 4."
        ),
    ] = None,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(help="With --openai: what clients call the model, once for each name; answers carry the first."),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="JET_API_KEY", help="With --openai: clients send it as a bearer token. Default: no key."),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="With --openai: an origin whose pages may call the API, once for each; '*': any."),
    ] = None,
    ssl_certfile: Annotated[str | None, typer.Option(help="With --openai: TLS certificate (chain), PEM.")] = None,
    ssl_keyfile: Annotated[str | None, typer.Option(help="With --openai: its key, PEM.")] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="With --openai: a file with a Jinja template to use instead of the bundle's.")
    ] = None,
    reasoning_parser: Annotated[
        str | None,
        typer.Option(help="With --openai: qwen3 answers with the model's thinking (<think>) as reasoning_content."),
    ] = None,
    generation_config: Annotated[
        str,
        typer.Option(help="With --openai: auto takes sampling defaults from the bundle's generation_config.json."),
    ] = "none",
    access_log: Annotated[bool, typer.Option("--access-log", help="With --openai: log each request.")] = False,
    replicas: Annotated[
        str | None, typer.Option(help="With --openai: engines behind one address, each on a GPU, by Ray; or auto.")
    ] = None,
    max_replicas: Annotated[int, typer.Option(help="With --replicas auto: at most.")] = 8,
    ray: Annotated[
        str | None, typer.Option(help="With --replicas: a Ray cluster's address; default: one on this machine alone.")
    ] = None,
    router: Annotated[
        str, typer.Option(help="With --replicas: prefix (and session), least (loaded) or round-robin.")
    ] = "prefix",
    slots: Annotated[int | None, typer.Option(help="Sequences at once; default: the bundle's max_batch_size.")] = None,
    kv_tokens: Annotated[
        int | None,
        typer.Option(help="KV cache size in tokens; default: the most that all sequences need."),
    ] = None,
    token_budget: Annotated[int | None, typer.Option(help="Tokens per step; default 512 on a CPU, else 2048.")] = None,
    mixed_prefill: Annotated[
        int | None,
        typer.Option(help="Prompt tokens of a step that also decodes; default on a GPU: 500 or more, by the batch."),
    ] = None,
    tpot_ms: Annotated[
        float | None,
        typer.Option(help="Milliseconds per output token to keep: bounds the prompt tokens of each step."),
    ] = None,
    max_waiting: Annotated[int, typer.Option(help="Requests in the queue; more are refused (429; Triton: 503).")] = 256,
    wait_timeout: Annotated[float, typer.Option(help="Seconds in the queue before a request is refused (503).")] = 60.0,
    deterministic: Deterministic = False,
    trusted_key: TrustedKey = None,
    step_timeout: Annotated[
        float,
        typer.Option(
            help="Seconds a step may take; then the engine hangs, and the process ends, status 70. 0: no limit."
        ),
    ] = 300.0,
    speculate: Speculate = "off",
    draft: Draft = None,
    drafts: Drafts = None,
    prefix_cache_bytes: Annotated[
        str | None,
        typer.Option(help="Device memory for cached prefixes, e.g. 4G; 0: none; default: a tenth of what is free."),
    ] = None,
    host_cache_bytes: Annotated[
        str | None,
        typer.Option(help="Host memory for preempted requests and evicted prefixes; default: a tenth, up to 4G."),
    ] = None,
) -> None:
    """Serve a bundle until SIGTERM or Ctrl-C: in Triton Inference Server, or over OpenAI's HTTP API."""
    from jet_export.runtime.capacity import Serving

    prefix, host_cache = prefix_cache_bytes, host_cache_bytes
    serving = Serving(
        slots=slots,
        kv_tokens=kv_tokens,
        token_budget=token_budget,
        mixed_prefill=mixed_prefill,
        tpot_ms=tpot_ms,
        max_waiting=max_waiting,
        wait_timeout=wait_timeout,
        deterministic=deterministic,
        speculate=speculate,
        draft=None if draft is None else str(draft.resolve()),
        drafts=drafts,
        prefix_cache_bytes=None if prefix is None else parse_bytes(prefix, "--prefix-cache-bytes"),
        host_cache_bytes=None if host_cache is None else parse_bytes(host_cache, "--host-cache-bytes"),
    )
    if replicas is None and ray is not None:
        raise JetExportError("serve --ray: belongs to --replicas.", "Add --openai --replicas 2, or auto.")
    if replicas is not None and not openai:
        raise JetExportError("serve --replicas: belongs to --openai.", "Triton has --instances.")
    if openai:
        if triton_repo:
            raise JetExportError("serve: --openai and --triton-repo exclude each other.")
        from jet_export.server.openai.http import Tls
        from jet_export.server.openai.options import ApiOptions
        from jet_export.server.openai.serve import HttpOptions
        from jet_export.server.openai.serve import serve as run_openai

        if (ssl_certfile is None) != (ssl_keyfile is None):
            raise JetExportError("serve: --ssl-certfile and --ssl-keyfile go together.")
        api = ApiOptions(
            names=tuple(served_model_name or ()),
            api_key=api_key,
            origins=tuple(cors_origin or ()),
            access_log=access_log,
            chat_template=chat_template,
            reasoning_parser=reasoning_parser,
        )
        tls = Tls(certfile=ssl_certfile, keyfile=ssl_keyfile) if ssl_certfile and ssl_keyfile else None
        http = HttpOptions(
            host=host,
            port=port,
            keep_alive=keep_alive_timeout,
            step_timeout=step_timeout,
            frontends=frontends,
            api=api,
            tls=tls,
            generation_config=generation_config,
        )
        if replicas is not None:
            from jet_export.server.ray.config import FleetConfig, parse_replicas
            from jet_export.server.ray.serve import serve_fleet

            fleet = FleetConfig(
                bundle=str(bundle),
                serving=serving,
                api=api,
                generation_config=generation_config,
                replicas=parse_replicas(replicas),
                most=max_replicas,
                router=router,
                ingresses=frontends or 1,
            )
            serve_fleet(fleet, http, ray, typer.echo)
            return
        run_openai(bundle, http, serving, typer.echo)
        return
    from jet_export.server.triton.repository import Repository, gpu_indices, write_repository
    from jet_export.server.triton.tritonserver import Ports, run_triton

    repository = Repository(
        bundle, serving=serving, instances=instances, gpus=gpu_indices(gpus), step_timeout=step_timeout
    )
    if triton_repo:
        write_repository(triton_repo, repository, force, typer.echo)
    else:
        run_triton(repository, host, Ports(http=http_port, grpc=grpc_port, metrics=metrics_port), typer.echo)
