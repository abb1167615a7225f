from loopscope.training.recipe import plan_training, variant_config  # temporary
