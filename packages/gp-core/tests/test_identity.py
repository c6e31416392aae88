import datetime
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gp_core import identity
from gp_core.errors import StoreError
from gp_core.identity import Identity


def test_it_is_made_once_and_private(tmp_path: Path) -> None:
    first = Identity.load(tmp_path / "gp")
    assert Identity.load(tmp_path / "gp") == first
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in (tmp_path / "gp").iterdir())
    assert len({*first.pins}) == 2


def test_processes_that_start_at_once_agree(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        loaded = {identity.pins for identity in pool.map(lambda _: Identity.load(tmp_path), range(8))}
    assert len(loaded) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["seal.key", "server-next.pem", "server.pem"]


def test_a_launcher_of_last_year_knows_the_certificate_after_the_rotation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Identity.load(tmp_path)
    sealed = before.seal(b"x")
    monkeypatch.setattr(identity, "ROTATE_AFTER", datetime.timedelta(0))
    after = Identity.load(tmp_path)
    assert after.pins[0] == before.pins[1]
    assert after.pins[1] not in before.pins
    assert after.unseal(sealed) == b"x"


def test_open_modes_are_closed(tmp_path: Path) -> None:
    Identity.load(tmp_path)
    os.chmod(tmp_path / "server.pem", 0o644)
    Identity.load(tmp_path)
    assert stat.S_IMODE((tmp_path / "server.pem").stat().st_mode) == 0o600


def test_a_damaged_key_is_an_error_that_names_the_folder(tmp_path: Path) -> None:
    (tmp_path / "server.pem").write_text("rubbish")
    with pytest.raises(StoreError, match=str(tmp_path)):
        Identity.load(tmp_path)


def test_secrets_are_sealed_for_servers_with_the_same_key(tmp_path: Path) -> None:
    one, other = Identity.load(tmp_path / "one"), Identity.load(tmp_path / "other")
    sealed = one.seal(b"hmac key")
    assert "hmac" not in sealed
    assert Identity.load(tmp_path / "one").unseal(sealed) == b"hmac key"
    with pytest.raises(StoreError, match="another server key"):
        other.unseal(sealed)
