from cast_serve.gateway.settings import GatewaySettings


def test_a_split_is_shares_that_sum_to_1() -> None:
    settings = GatewaySettings(split="a=dense:3,sparse:1; b=dense:1")
    assert settings.split_weights == {"a": {"dense": 0.75, "sparse": 0.25}, "b": {"dense": 1.0}}
