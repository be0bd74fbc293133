"""What methods are made of: losses, the lookahead, mixup, pseudo labels, optimisers."""
