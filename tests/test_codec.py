from __future__ import annotations

import json
import math
import tomllib
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import pytest
import tomli_w

from cggr_ray.codec import from_plain, kind_of, to_plain, to_toml, with_values


@dataclass(frozen=True)
class RedPaint:
    IS_PART: ClassVar[bool] = True

    depth: float = 0.5
    coats: int = 2


@dataclass(frozen=True)
class BluePaint:
    IS_PART: ClassVar[bool] = True
    KIND: ClassVar[str] = "azure"

    tint: Literal["light", "dark"] = "light"
    mixed_with: RedPaint | None = None


@dataclass(frozen=True)
class Lamp:
    IS_PART: ClassVar[bool] = False

    watts: int


@dataclass(frozen=True)
class Room:
    IS_PART: ClassVar[bool] = False

    name: str
    wall: RedPaint | BluePaint = field(default_factory=RedPaint)
    lamps: tuple[Lamp, ...] = ()
    doors: tuple[int, ...] = (1,)
    labels: dict[str, dict[str, Any]] = field(default_factory=dict)
    area: float | None = None
    furnished: bool = False
    beside_bed: Lamp | None = None


FULL = Room(
    "hall",
    BluePaint("dark", RedPaint(0.25, 1)),
    (Lamp(40), Lamp(60)),
    (3, 4),
    {"north": {"a": 1, "b": [1, "two"]}},
    12.5,
    True,
)


@pytest.mark.parametrize("room", [Room("cell"), FULL], ids=["defaults", "full"])
def test_round_trip_through_json(room: Room) -> None:
    assert from_plain(Room, json.loads(json.dumps(to_plain(room)))) == room


@pytest.mark.parametrize("area", [math.inf, -math.inf])
def test_infinity_is_a_word_that_every_reader_of_json_takes(area: float) -> None:
    room = Room("hall", RedPaint(area), area=area, labels={"north": {"a": area}})
    written = json.dumps(to_plain(room), allow_nan=False)
    read = from_plain(Room, json.loads(written))
    assert (read.area, read.wall) == (area, RedPaint(area)) and to_plain(read) == to_plain(room)
    assert from_plain(Room, tomllib.loads(f"name = 'hall'\narea = {area}")).area == area
    assert with_values(Room("hall"), {"area": str(area), "wall.depth": area}) == Room("hall", RedPaint(area), area=area)


def test_what_is_written() -> None:
    assert to_plain(FULL) == {
        "name": "hall",
        "wall": {"kind": "azure", "tint": "dark", "mixed_with": {"kind": "red_paint", "depth": 0.25, "coats": 1}},
        "lamps": [{"watts": 40}, {"watts": 60}],
        "doors": [3, 4],
        "labels": {"north": {"a": 1, "b": [1, "two"]}},
        "area": 12.5,
        "furnished": True,
    }
    assert "area" not in to_plain(Room("cell"))


def test_kinds_are_snake_case_unless_fixed() -> None:
    assert (kind_of(RedPaint), kind_of(BluePaint), kind_of(Lamp)) == ("red_paint", "azure", "lamp")


def test_a_bare_kind_and_a_whole_number_for_a_float_are_accepted() -> None:
    assert from_plain(Room, {"name": "x", "wall": "azure", "area": 3}) == Room("x", BluePaint(), area=3.0)
    assert isinstance(from_plain(Room, {"name": "x", "area": 3}).area, float)


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({"name": "x", "wal": 1}, r"unknown key 'wal'; did you mean 'wall'\?"),
        ({"name": "x", "wall": {"kind": "red_paint", "coat": 1}}, r"'wall\.coat'; did you mean 'coats'\?"),
        ({"name": "x", "wall": {"kind": "red_pain"}}, r"wall\.kind = 'red_pain'; did you mean 'red_paint'\?"),
        ({"name": "x", "wall": {"depth": 0.1}}, r"wall\.kind = None; .*azure, red_paint"),
        ({"name": "x", "wall": {"kind": ["azure"]}}, r"wall\.kind = \['azure'\]; .*azure, red_paint"),
        ({"name": "x", "wall": 3}, r"wall = 3; .*azure, red_paint"),
        ({"name": "x", "wall": {"kind": "azure", "tint": "ligth"}}, r"wall\.tint = 'ligth'; did you mean 'light'\?"),
        ({"name": "x", "wall": {"kind": "red_paint", "coats": "two"}}, r"wall\.coats = 'two'; accepted: int"),
        ({"name": "x", "wall": {"kind": "red_paint", "coats": 2.0}}, r"wall\.coats = 2\.0; accepted: int"),
        ({"name": "x", "wall": {"kind": "red_paint", "coats": True}}, r"wall\.coats = True; accepted: int"),
        ({"name": "x", "wall": {"kind": "red_paint", "depth": True}}, r"wall\.depth = True; accepted: float"),
        ({"name": "x", "furnished": 1}, r"furnished = 1; accepted: bool"),
        ({"name": 5}, r"name = 5; accepted: str"),
        ({"name": "x", "lamps": [{"watts": 1}, {}]}, r"missing key 'lamps\[1\]\.watts' of lamp"),
        ({"name": "x", "lamps": [4]}, r"lamps\[0\] = 4; accepted: a table"),
        ({"name": "x", "beside_bed": True}, r"beside_bed = True; accepted: a table or none"),
        ({"name": "x", "beside_bed": "lamp"}, r"beside_bed = 'lamp'; accepted: a table or none"),
        ({"name": "x", "wall": {"kind": "azure", "mixed_with": 3}}, r"wall\.mixed_with = 3; .*one of none, red_paint"),
        ({"name": "x", "doors": 4}, r"doors = 4; accepted: a list"),
        ({"name": "x", "doors": [1, "b"]}, r"doors\[1\] = 'b'; accepted: int"),
        ({"name": "x", "labels": {"north": 1}}, r"labels\.north = 1; accepted: a table"),
        ({"name": "x", "area": "big"}, r"area = 'big'; accepted: float"),
        ({}, r"missing key 'name' of room"),
        (7, r"7; accepted: a table"),
    ],
)
def test_what_does_not_fit_is_named_in_one_line(plain: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        from_plain(Room, plain)
    assert "\n" not in str(error.value)


def test_dotted_values_replace_scalars_tables_and_whole_parts() -> None:
    changed = with_values(FULL, {"area": None, "wall.tint": "light", "wall.mixed_with.coats": 9})
    assert changed == Room(
        "hall", BluePaint("light", RedPaint(0.25, 9)), FULL.lamps, FULL.doors, FULL.labels, None, True
    )
    assert with_values(FULL, {"wall": "red_paint"}).wall == RedPaint()
    assert with_values(FULL, {"wall": {"kind": "red_paint", "coats": 3}}).wall == RedPaint(coats=3)
    assert with_values(Room("cell"), {"area": 2}).area == 2.0


def test_a_part_can_be_replaced_and_then_changed() -> None:
    table = {"kind": "azure"}
    for part in ("azure", table):
        assert with_values(Room("cell"), {"wall": part, "wall.tint": "dark"}).wall == BluePaint("dark")
    assert table == {"kind": "azure"}


def test_what_is_not_there_is_a_word_in_toml() -> None:
    taken = {"wall.mixed_with": None, "area": None, "doors": [3], "labels": {"north": {"a": None}}}
    written = tomllib.loads(tomli_w.dumps(to_toml(taken)))
    assert written == {"wall.mixed_with": "none", "area": "none", "doors": [3], "labels": {"north": {"a": "none"}}}
    changed = with_values(FULL, {key: value for key, value in written.items() if key != "labels"})
    assert changed == Room("hall", BluePaint("dark"), FULL.lamps, (3,), FULL.labels, None, True)
    lit = replace(FULL, beside_bed=Lamp(5))
    assert with_values(lit, {"beside_bed": "none"}) == FULL and with_values(FULL, {"beside_bed": {"watts": 5}}) == lit
    with pytest.raises(ValueError, match=r"wall\.kind = 'none'; accepted: azure, red_paint"):
        with_values(FULL, {"wall": "none"})
    with pytest.raises(ValueError, match="furnished = 'none'; accepted: bool"):
        with_values(FULL, {"furnished": "none"})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"wall": "azure", "wall.mixed_with.coats": 9},
            r"where 'wall.mixed_with' is none; .*wall.mixed_with={coats=...}",
        ),
        ({"beside_bed.watts": 9}, r"'beside_bed.watts' where 'beside_bed' is none; .*beside_bed={watts=...}"),
        ({"area.size": 9}, r"'area' is not a table"),
        ({"wall.dept": 1.0}, r"unknown key 'wall\.dept'; did you mean 'depth'\?"),
        ({"wal.depth": 1.0}, r"'wal' is not a table; did you mean 'wall'\?"),
        ({"name.first": "x"}, r"'name' is not a table"),
        ({"wall": "azur"}, r"did you mean 'azure'\?"),
        ({"wall.coats": "two"}, r"wall\.coats = 'two'; accepted: int"),
    ],
)
def test_dotted_values_are_strict(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_values(Room("cell"), values)
