"""Settings of the farm: flags over `FARM_*` variables over `farm.toml` over the defaults below."""

import difflib
import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource
from pydantic_settings import SettingsError as UnreadableError

from farm.errors import SettingsError


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
    renderers: int | None = Field(
        default=None, gt=0, description="renderers to start; one per GPU where empty, one without GPUs"
    )
    vram_gib: float = Field(default=16.0, gt=0, description="GPU memory one renderer may use, GiB")
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
        raise SettingsError(
            f"setting {name}: {first['msg']}, got {first['input']!r}; mend {variable}, farm.toml or the flag"
        ) from exc
    except UnreadableError as exc:
        raise SettingsError(
            f"variable FARM_SHARES is no JSON, got {os.environ.get('FARM_SHARES', '')!r}; write it as "
            """'{"alice": 2, "bob": 1}'"""
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
