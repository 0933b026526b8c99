import logging

# transformers imports torchao wherever it is installed. That reports every kernel that was built for other
# hardware, and torch that a registration of torchao's is out of date. accelerate says that weights lie on
# disk where they were sent. All this is no news to who loads a model.
_NO_NEWS = ("Failed to load ", "%s is an Enum subclass", "Some parameters are on the meta device")
for _name in ("torchao", "torch.utils._pytree", "accelerate.big_modeling"):
    logging.getLogger(_name).addFilter(lambda record: not str(record.msg).startswith(_NO_NEWS))
