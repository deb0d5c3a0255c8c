"""Names of figures and folders where there is one test set, or several."""

from fbn_plugin.engine.run.evaluation_names import inference_folder, metric_prefix


def test_one_test_set_or_several():
    one, two = ["my/data:val"], ["my/data:val", "coco"]
    assert metric_prefix(one[0], one) == "" and metric_prefix(one[0], two) == "my/data:val/"
    assert inference_folder("out", one[0], one) == "out/inference"
    assert inference_folder("out", one[0], two) == "out/inference/my_data_val"
    assert inference_folder("out", "coco", two, "inference.tmp") == "out/inference.tmp/coco"
