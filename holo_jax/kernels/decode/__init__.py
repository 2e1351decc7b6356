"""One token after another: parts of a layer, all layers in one kernel, the next token."""
