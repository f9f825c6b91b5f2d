"""Settings of the farm: flags over `FARM_*` variables over `farm.toml` over the defaults below."""

import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource
from pydantic_settings import SettingsError as UnreadableError

from farm.errors import SettingsError

Weekday = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
_HOUR = r"([01][0-9]|2[0-3]):[0-5][0-9]"


class Reserve(BaseModel):
    """Renderers kept for urgent images at some hours. Of several rules that hold at a moment the first one counts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    renderers: int = Field(default=0, ge=0, description="how many take no shards of jobs")
    warm: tuple[str, ...] = Field(default=(), description="models kept loaded: on those, else on idle ones")
    hours: str = Field(
        default="00:00-24:00", pattern=rf"^{_HOUR}-({_HOUR}|24:00)$", description="from-to; may pass midnight"
    )
    days: tuple[Weekday, ...] = Field(
        default=get_args(Weekday), min_length=1, description="days on which `hours` begin"
    )
    zone: str = Field(default="UTC", description="time zone of `hours`, as Europe/Berlin")


class Settings(BaseSettings):
    """What one process of the farm needs to know. Credentials are boto3's own affair (AWS_* variables, profiles)."""

    model_config = SettingsConfigDict(env_prefix="FARM_", toml_file="farm.toml", extra="forbid", frozen=True)

    store: str = Field(default="./farm-data", description="a folder, or s3://bucket/prefix")
    s3_endpoint: str | None = Field(default=None, description="URL of the S3 server; AWS's own where empty")
    s3_public_endpoint: str | None = Field(
        default=None, description="URL that presigned links use; the endpoint where empty"
    )
    s3_region: str = Field(default="us-east-1", description="region to sign for")
    s3_addressing: Literal["auto", "path", "virtual"] = Field(
        default="auto", description="bucket in the path or the host name"
    )
    models: Path | None = Field(default=None, description="folder of model cards of your own, searched first")
    weights: Path = Field(
        default=Path("~/.cache/diffusion-farm/weights"),
        description="folder on each node for copies of weights that lie in buckets",
    )
    remote_code: tuple[Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")], ...] = Field(
        default=(),
        description="digests of code that comes with weights and may be run; `farm models NAME` says a card's",
    )
    renderers: int | None = Field(
        default=None, gt=0, description="renderers to start; where empty one per GPU, or what the cores allow"
    )
    vram_gib: float = Field(
        default=16.0, gt=0, description="GPU memory one renderer may use, GiB, on any larger card too"
    )
    host_gib: float | None = Field(
        default=None,
        ge=0,
        description="main memory of each node for models that are not in use, so that they come back by a copy, GiB; half of "
        "what is free where empty",
    )
    address: str | None = Field(
        default=None, description="Ray address of a running farm; this machine's own where empty"
    )
    owner: str | None = Field(
        default=None,
        min_length=1,
        max_length=100,
        description="whose jobs are submitted here; the user's name where empty",
    )
    shares: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(
        default={}, description="owner -> weight of their share of the GPUs' time; 1 for who is not named"
    )
    http_host: str = Field(default="127.0.0.1", description="address that the endpoint listens on")
    http_port: int = Field(default=8000, ge=0, le=65535, description="port of the endpoint")
    gateways: int = Field(default=1, gt=0, description="replicas of the endpoint's gateway")
    tls_cert: Path | None = Field(default=None, description="certificate chain, PEM; the endpoint then speaks HTTPS")
    tls_key: Path | None = Field(default=None, description="private key of tls_cert, PEM")
    tls_proxy: str | None = Field(
        default=None, description="address or network of the proxy that ends TLS in front of the endpoint"
    )
    public_url: str | None = Field(
        default=None, description="URL that people reach the endpoint at; what its links begin with"
    )
    http_sources: tuple[str, ...] = Field(
        default=(), description="s3:// prefixes that manifests sent over HTTP may read prompts from"
    )
    max_waiting: int = Field(
        default=512, gt=0, description="urgent images that may wait in the farm; more are refused with 503"
    )
    images_days: float = Field(
        default=30.0, ge=0, description="days that single images of the endpoint are kept; 0 keeps none"
    )
    reserve: tuple[Reserve, ...] = Field(
        default=(), description="renderers kept free for urgent images, and models kept loaded, by time of day"
    )
    url: str | None = Field(
        default=None, description="a farm's endpoint; commands then speak to that, not to the store"
    )
    key: SecretStr | None = Field(default=None, description="key for that endpoint")
    runtime_dir: Path = Field(
        default_factory=lambda: Path(f"/tmp/farm-{os.getuid()}"),
        description="where farms of this user on this machine find each other",
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)


_EXAMPLES = {
    "shares": '\'{"alice": 2, "bob": 1}\'',
    "remote_code": "'[\"4f5c...\"]'",
    "http_sources": "'[\"s3://captions/\"]'",
    "reserve": '\'[{"renderers": 1, "hours": "08:00-18:00"}]\'',
}


def load_settings(**flags: object) -> Settings:
    """Read settings; `flags` that are None count as not given. Raises SettingsError naming the value and its bounds."""
    _refuse_misspelt()
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        return Settings(**given)  # type: ignore[arg-type]
    except ValidationError as exc:
        first = exc.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            near = difflib.get_close_matches(name, list(Settings.model_fields), n=1)
            advice = f"did you mean {near[0]}?" if near else f"known are {', '.join(Settings.model_fields)}"
            raise SettingsError(f"farm.toml: unknown key {name}; {advice}") from exc
        variable = f"FARM_{str(first['loc'][0]).upper()}" if first["loc"] else "the variable"
        example = _EXAMPLES.get(name.partition(".")[0])
        said = f", written as {example}" if example else ""
        raise SettingsError(
            f"setting {name}: {first['msg']}, got {first['input']!r}; mend {variable}{said}, farm.toml or the flag"
        ) from exc
    except UnreadableError as exc:
        found = re.search(r'field "(\w+)"', str(exc))
        name = found.group(1) if found else "shares"
        variable = f"FARM_{name.upper()}"
        raise SettingsError(
            f"variable {variable} is no JSON, got {os.environ.get(variable, '')!r}; write it as {_EXAMPLES.get(name, '{}')}"
        ) from exc
    except (OSError, ValueError) as exc:
        raise SettingsError(f"farm.toml: {exc}; mend it, or move it away") from exc


def _refuse_misspelt() -> None:
    """Raise SettingsError for a variable that is nearly one of ours: it would be passed over without a word."""
    known = [f"FARM_{name.upper()}" for name in Settings.model_fields]
    for name in sorted(os.environ):
        if name.upper().startswith("FARM_") and name.upper() not in known:
            near = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.8)
            if near:
                raise SettingsError(f"variable {name} is no setting; did you mean {near[0]}?")
