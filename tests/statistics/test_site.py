"""What linears of one site share."""

import torch

from lqer.statistics.site import SiteStatistics, derive


def test_what_follows_from_statistics_is_made_once_for_each_set_of_arguments():
    made = []

    def scaled(statistics, factor):
        made.append(factor)
        return statistics["x"] * factor

    site = SiteStatistics({"x": torch.ones(2)})
    assert derive(site, scaled, 2) is derive(site, scaled, 2)
    assert derive(site, scaled, 3).tolist() == [3, 3]
    assert derive(SiteStatistics(site), scaled, 2) is not derive(site, scaled, 2)
    assert made == [2, 3, 2]


def test_a_plain_mapping_keeps_nothing():
    plain = {"x": torch.ones(2)}
    assert derive(plain, lambda statistics: statistics["x"] + 1) is not plain["x"]
    assert plain.keys() == {"x"}


def test_it_is_the_mapping_it_was_made_of():
    statistics = {"x": torch.ones(2), "y": torch.zeros(1)}
    assert dict(SiteStatistics(statistics)) == statistics
    assert len(SiteStatistics(statistics)) == 2
