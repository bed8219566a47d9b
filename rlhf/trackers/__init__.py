"""One file a tracker; each is a `rlhf.protocols.Tracker` and is named in `rlhf.tracking.KNOWN`."""
