"""Cards as a gateway keeps them."""

import asyncio
import shutil
from pathlib import Path

import pytest

from farm.devices import DeviceInfo
from farm.errors import ModelCardError, UnknownModelError
from farm.modelcard import find_card
from farm.server import cards as module
from farm.server.cards import Cards
from farm.settings import Settings
from farm.weights import pinned

CPU = DeviceInfo("cpu", "a CPU", (), 4)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    folder = tmp_path / "cards"
    folder.mkdir()
    shutil.copy(Path("manifests/models/sketch.yaml"), folder)
    return Settings(models=folder)


def test_a_card_is_ready_with_its_weights_and_numerics(settings):
    async def main() -> None:
        cards = Cards(settings)
        ready = await cards.ready("sketch", CPU, 2)
        assert ready.card == pinned(find_card("sketch", settings))
        assert (ready.numerics.device, ready.numerics.dtype, ready.numerics.threads) == ("cpu", "float32", 1)
        again = await cards.ready("sketch", CPU, 2)
        assert again.card is ready.card
        assert again.numerics is ready.numerics

    asyncio.run(main())


def test_many_who_ask_first_read_the_card_once(settings, monkeypatch):
    async def main() -> None:
        cards = Cards(settings)
        reads = []
        real = cards._read
        monkeypatch.setattr(cards, "_read", lambda name: (reads.append(name), real(name))[1])
        first = asyncio.create_task(cards.pinned("sketch"))
        others = [asyncio.create_task(cards.pinned("sketch")) for _ in range(9)]
        await asyncio.sleep(0)
        first.cancel()
        assert {card.name for card in await asyncio.gather(*others)} == {"sketch"}
        assert reads == ["sketch"]

    asyncio.run(main())


def test_a_card_that_is_wrong_is_told_and_hides_no_other(settings, caplog):
    (settings.models / "bad.yaml").write_text("name: bad\nfamily: none\n")
    found = asyncio.run(Cards(settings).all())
    assert "sketch" in [card.name for card in found]
    assert "bad" not in [card.name for card in found]
    assert [record.model for record in caplog.records] == ["bad"]
    with pytest.raises(ModelCardError, match=r"bad\.yaml:2"):
        asyncio.run(Cards(settings).pinned("bad"))


def test_an_unknown_model_is_refused_and_not_remembered(settings):
    async def main() -> None:
        cards = Cards(settings)
        with pytest.raises(UnknownModelError, match="no model card is called 'sketsh'; did you mean sketch"):
            await cards.pinned("sketsh")
        assert (cards._known, cards._first) == ({}, {})

    asyncio.run(main())


def test_a_changed_card_is_seen_by_who_asks_later(settings, monkeypatch):
    monkeypatch.setattr(module, "CARDS_S", -1.0)
    file = settings.models / "sketch.yaml"

    async def settled(cards: Cards) -> None:
        await cards.pinned("sketch")
        while cards._known.get("sketch") and cards._known["sketch"].reading:  # noqa: ASYNC110
            await asyncio.sleep(0.005)

    async def main() -> None:
        cards = Cards(settings)
        await cards.pinned("sketch")
        file.write_text(file.read_text().replace("max_steps: 200", "max_steps: 50"))
        await settled(cards)
        assert (await cards.pinned("sketch")).max_steps == 50
        file.write_text("name: [")
        await settled(cards)
        assert (await cards.pinned("sketch")).max_steps == 50
        file.unlink()  # the packaged card of that name is there still
        await settled(cards)
        assert (await cards.pinned("sketch")).max_steps == 200

    asyncio.run(main())
