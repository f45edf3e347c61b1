"""Document 004: did learned loss weights, or un-detached attention, make the accuracy of a pretrained ViT collapse?

    python -m jaxdistill.main --config=experiments/dcal_document_004/document_004.py --workdir=workdir/document_004

A tiny ViT is pretrained on the letters of configs/dcal.py and then fine-tuned, with a new head, on other drawings of them, as the document
fine-tuned a ViT on birds: every branch on, weight decay 0.05. `coupled` adds the decay to the gradient, as torch.optim.Adam does;
`decoupled` beside it, as AdamW does; `coupled_bounds_2` and `decoupled_bounds_5` add the document's bounds of the learned weights.
"""

from configs import dcal

UPDATES = 1200


def get_config():
    config = dcal.get_config()
    config.headline = "decoupled"
    tune = dict(steps=UPDATES, lr=2e-4, final_lr=1.0, eval_every=UPDATES // 15, checkpoint_every=UPDATES, batch=16)
    start = dict(path="", preset="tiny", patch=0, width=0, depth=0, heads=0)
    decay = lambda kind, **more: dict(recipe="dcal", train=tune, model=start, data=dict(seed=7), optimizer=dict(decay=kind),  # noqa: E731
                                      dcal=dict(mode="full", **more))
    config.seeds = (0, 1, 2)
    config.dcal.figures = 0
    config.model = dict(config.model)
    config.run = dict(
        pretrained=dict(recipe="dcal", once=True, fills="model.path", given="model.path", dcal=dict(mode="sa_only")),
        decoupled=decay("decoupled"), coupled=decay("coupled"),
        decoupled_bounds_5=decay("decoupled", bounds=(-5.0, 5.0)), coupled_bounds_2=decay("coupled", bounds=(-2.0, 2.0)),
    )
    config.runs = ("pretrained", "decoupled", "coupled", "decoupled_bounds_5", "coupled_bounds_2")
    return config
