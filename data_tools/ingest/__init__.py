"""Pictures and captions from anywhere to image shards.

    shards      the way of all sources into the shards: `ingest(items)`
    prepare     one picture, in a worker: read, filtered, checked, cut
    records     a row's captions and labels, and the columns that hold them
    options     the arguments that sources share
    items       what a source gives: `Found`, `SetAside`, `Wanted`

A source each, which yields items in its order: `folder`, `coco`, `hf`, `tars`, `table`, `iconify`.
"""
