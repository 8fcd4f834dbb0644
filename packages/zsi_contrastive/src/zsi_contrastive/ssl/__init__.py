"""What `zsi_contrastive.pretrain` is made of: pictures, views, networks, methods, measures, report."""
