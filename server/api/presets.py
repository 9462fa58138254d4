"""`POST /api/generate/character`, `/moodboard` and `/animation`: what apps ask for most, as thin forms of `POST /api/generate`."""

from typing import Annotated, Any
from uuid import UUID

import msgspec
from litestar import Request, Response, Router, post
from litestar.params import JSONBody
from msgspec import Meta

from server.api.door import needs, services_of
from server.api.generate import (
    MOST_PROMPT_CHARACTERS,
    MOST_REFERENCES,
    CallbackWish,
    EntityType,
    GenerateWish,
    Id,
    Kind,
    NewJobAnswer,
    OutputSpec,
    create,
)
from server.api.services import Services
from server.auth import Scope
from server.generation.prompts import animation_prompt, character_prompt, moodboard_prompt
from server.setting_values import Preset

MOST_OUTPUTS = 16
_IMAGE_BYTES = 16 * 2**20
"""Room for an image of 2,048 by 2,048 pixels as PNG at its worst (12 MiB), unless `max_bytes` says otherwise."""
_VIDEO_BYTES = 128 * 2**20
"""Room for a minute at 16 Mbit/s (115 MiB)."""
_MOST_FIELD_CHARACTERS = 2_000

Http = Request[Any, Any, Any]
Text = Annotated[str, Meta(max_length=_MOST_FIELD_CHARACTERS)]


class PresetWish(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What all of them take. `prompt` replaces the one that is made of the fields. `pipeline` left out is the one that the settings name
    for such jobs, if any. The other fields are those of `POST /api/generate`.
    """

    entity_id: Id
    count: Annotated[int, Meta(ge=1, le=MOST_OUTPUTS)] = 1
    max_bytes: Annotated[int, Meta(ge=1)] | None = None
    prompt: Annotated[str, Meta(max_length=MOST_PROMPT_CHARACTERS)] | None = None
    style: Text | None = None
    pipeline: Annotated[str, Meta(max_length=64)] | None = None
    project_id: Id | None = None
    model: Annotated[str, Meta(min_length=1, max_length=255)] | None = None
    parameters: dict[str, Any] = {}
    references: Annotated[list[UUID], Meta(max_length=MOST_REFERENCES)] = []
    parent_id: UUID | None = None
    callback: CallbackWish | None = None
    ttl_seconds: Annotated[int, Meta(ge=1)] | None = None


class CharacterWish(PresetWish, kw_only=True):
    """Pictures of one character, alone."""

    name: Text | None = None
    appearance: Text | None = None
    clothing: Text | None = None
    accessories: Annotated[list[Text], Meta(max_length=32)] = []


class MoodboardWish(PresetWish, kw_only=True):
    """Pictures of characters in a scene; `references` are theirs, in the same order."""

    characters: Annotated[list[Text], Meta(max_length=MOST_REFERENCES)] = []
    action: Text | None = None
    pose: Text | None = None
    scene: Text | None = None
    universe: Text | None = None


class AnimationWish(PresetWish, kw_only=True):
    """Videos that begin with an image, `image_id`, which becomes the first reference."""

    image_id: UUID
    motion: Text | None = None
    camera: Text | None = None
    duration_seconds: Annotated[float, Meta(gt=0, le=600)] | None = None


@post("/character", guards=[needs(Scope.JOBS_WRITE)], status_code=201)
async def generate_character(request: Http, data: JSONBody[CharacterWish]) -> Response[NewJobAnswer]:
    """A job for pictures of one character."""
    prompt = character_prompt(
        name=data.name, appearance=data.appearance, clothing=data.clothing, accessories=data.accessories, style=data.style
    )
    return await create(request, _wish(services_of(request), data, "character", "image", prompt))


@post("/moodboard", guards=[needs(Scope.JOBS_WRITE)], status_code=201)
async def generate_moodboard(request: Http, data: JSONBody[MoodboardWish]) -> Response[NewJobAnswer]:
    """A job for pictures of characters in a scene."""
    prompt = moodboard_prompt(
        characters=data.characters,
        action=data.action,
        pose=data.pose,
        scene=data.scene,
        universe=data.universe,
        style=data.style,
    )
    return await create(request, _wish(services_of(request), data, "moodboard", "image", prompt))


@post("/animation", guards=[needs(Scope.JOBS_WRITE)], status_code=201)
async def generate_animation(request: Http, data: JSONBody[AnimationWish]) -> Response[NewJobAnswer]:
    """A job for videos that begin with an image."""
    wish = _wish(
        services_of(request),
        data,
        "animation",
        "video",
        animation_prompt(motion=data.motion, camera=data.camera, style=data.style),
    )
    others = [each for each in wish.references if each != data.image_id]
    duration = {} if data.duration_seconds is None else {"duration_seconds": data.duration_seconds}
    wish = msgspec.structs.replace(wish, references=[data.image_id, *others], parameters={**duration, **wish.parameters})
    return await create(request, wish)


def _wish(services: Services, data: PresetWish, preset: Preset, kind: Kind, prompt: str) -> GenerateWish:
    entity_type: EntityType = preset
    usual_bytes = _VIDEO_BYTES if kind == "video" else _IMAGE_BYTES
    max_bytes = min(usual_bytes, services.settings.max_file_bytes) if data.max_bytes is None else data.max_bytes
    chosen = next((each.name for each in services.settings.pipelines if preset in each.presets), None)
    return GenerateWish(
        outputs=[OutputSpec(type=kind, max_bytes=max_bytes)] * data.count,
        pipeline=data.pipeline or chosen,
        entity_type=entity_type,
        entity_id=data.entity_id,
        project_id=data.project_id,
        model=data.model,
        prompt=prompt if data.prompt is None else data.prompt,
        parameters=data.parameters,
        references=data.references,
        parent_id=data.parent_id,
        callback=data.callback,
        ttl_seconds=data.ttl_seconds,
    )


router = Router(path="/api/generate", route_handlers=[generate_character, generate_moodboard, generate_animation], tags=["Generation"])
