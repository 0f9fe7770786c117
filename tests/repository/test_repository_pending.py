from cumbre.core.instrument import load_instrument
from cumbre.repository.pending import Item, PendingState, by_priority


def item(detector, attempt=1):
    return Item("MC_O_20261120_000001", "LSSTCam", "g", detector, f"d{detector}", "/x", attempt=attempt)


def test_wavefront_sensors_go_first_and_guiders_last():
    camera = load_instrument("lsstcam")
    purposes = {("LSSTCam", d.id): d.purpose for d in camera.detectors}
    groups = by_priority([item(94), item(189), item(191), item(0)], purposes)
    assert [[i.detector for i in group] for group in groups] == [[191], [94, 0], [189]]


def test_three_tries_and_a_busy_registry_costs_none():
    state = PendingState()
    one = item(1)
    for _ in range(5):
        assert state.retry(one, not_before_tai=10.0, count=False)
        assert state.due(9.0) == []
        (one,) = state.due(10.0)
    assert one.attempt == 1
    assert state.retry(one, not_before_tai=0.0)
    (one,) = state.due(0.0)
    assert state.retry(one, not_before_tai=0.0)
    (one,) = state.due(0.0)
    assert one.attempt == 3
    assert not state.retry(one, not_before_tai=0.0)
    assert state.due(1e9) == []


def test_state_survives_its_text():
    state = PendingState()
    state.expect("MC_O_20261120_000001", "LSSTCam", ["R22_S11", "R22_S12"], 5.0)
    state.ingested("MC_O_20261120_000001", "LSSTCam", "R22_S11", 6.0)
    state.retry(item(3), not_before_tai=7.0)
    again = PendingState.from_json(state.to_json())
    assert again.to_json() == state.to_json()
    assert again.complete() == []
    again.ingested("MC_O_20261120_000001", "LSSTCam", "R22_S12", 8.0)
    assert [image.obs_id for image in again.complete()] == ["MC_O_20261120_000001"]
    assert again.images == {}
