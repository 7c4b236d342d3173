"""Contract tests for plugin authors: one call says whether a component does what its kind promises.

    from engine.testing import check_interest

    def test_the_contract():
        check_interest(MyInterest)

Each raises AssertionError with one sentence that names the plugin and the clause it breaks. `options` is a mapping or
an instance of the plugin's own Options; leave it out where every option has a default.
"""

from engine.testing.dataset import check_dataset
from engine.testing.embedding import check_embedding
from engine.testing.encoder import check_encoder
from engine.testing.event_log import check_event_log
from engine.testing.feedback import check_delayed_feedback
from engine.testing.interest import check_interest
from engine.testing.loss import check_loss
from engine.testing.ranker import check_ranker
from engine.testing.reranker import check_reranker
from engine.testing.retriever import check_retriever
from engine.testing.sampler import check_sampler
from engine.testing.scorer import check_scorer
from engine.testing.source import check_source
from engine.testing.state_store import check_state_store
from engine.testing.world import TinyCatalogue, tiny_context

__all__ = [
    "TinyCatalogue",
    "check_dataset",
    "check_delayed_feedback",
    "check_embedding",
    "check_encoder",
    "check_event_log",
    "check_interest",
    "check_loss",
    "check_ranker",
    "check_reranker",
    "check_retriever",
    "check_sampler",
    "check_scorer",
    "check_source",
    "check_state_store",
    "tiny_context",
]
