"""compress-model push"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import rich_click as click

from compress.commands.common import common_options, print_json, progress_shown


@click.command()
@click.argument("model", type=click.Path(path_type=Path), metavar="DIR|FILE.gguf")
@click.argument("repository", metavar="USER/NAME")
@click.option("--public", is_flag=True, help="Let everybody see it. [default: a new model is private]")
@click.option("--revision", help="Branch to push to, made if it is not there. [default: main]")
@click.option("--message", help="Message of the commit. [default: the model's name and this version]")
@click.option(
    "--license",
    "licence",
    metavar="NAME",
    help="Licence, such as apache-2.0. Needed where that of the base model is not known.",
)
@click.option("--overwrite", is_flag=True, help="Replace the files that are in the repository already.")
@common_options
def push(
    model: Path,
    repository: str,
    public: bool,
    revision: str | None,
    message: str | None,
    licence: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Push a model that compress-model wrote to the hub, as USER/NAME, with its card.

    Weights are pushed as safetensors or GGUF only, beside the small files of the model. They must be as they
    were written. The access token is that of 'hf auth login', or HF_TOKEN. An interrupted push goes on when
    it is given again, and nobody sees anything of it before it is complete.
    """
    from compress.export.hub import push as push_to_hub
    from compress.export.publication import publication

    with progress_shown() as progress:
        found = publication(model, licence, progress)
        done = push_to_hub(
            *(found, repository),
            public=public,
            revision=revision,
            message=message,
            overwrite=overwrite,
            progress=progress,
        )
    base = found.base.id if found.base else None
    if as_json:
        files = {file.name: file.sha256 for file in found.files}
        print_json({**asdict(done), "base_model": base, "license": found.licence, "files": files})
        return
    seen = "private" if done.private else "public"
    if done.unchanged:
        click.echo(
            f"{done.url} ({seen}) has this model already, as commit {done.commit[:12]} of {done.revision}."
        )
        return
    click.echo(
        f"{done.url} ({seen}): {len(found.files)} files, {found.nbytes / 1e6:,.1f} MB, licence "
        f"{found.licence}, commit {done.commit[:12]} of {done.revision}."
    )
    if base is None:
        click.echo("The card names no base model, because no model on the hub is on record.")
