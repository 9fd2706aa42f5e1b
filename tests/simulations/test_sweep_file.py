"""Which runs a sweep file means, and what is said to a wrong one."""

import pytest

from common.errors import InputError
from simulations.sweep_file import read_sweep

FILE = """
seeds = [0, 3]
tasks = ["sst2", "toy"]
ceiling = true
rounds = 4
data.clients = 6

[student]
layers = 2

[arms.base]

[arms.many]
rounds = 9
student.layers = 3
"client.lr" = 0.01

[arms.many.distill]
temperature = 4.0
"""


@pytest.fixture
def write(tmp_path):
    def put(text):
        (tmp_path / "a.toml").write_text(text)
        return tmp_path / "a.toml"

    return put


def test_arms_lie_over_the_base_for_each_task_and_seed(write):
    found = read_sweep(write(FILE))
    assert [str(run.folder) for run in found.runs] == [
        f"{arm}/{task}/seed-{seed}" for seed in (0, 3) for task in ("sst2", "toy") for arm in ("base", "many")
    ]
    assert found.ceiling
    base, many = found.runs[4], found.runs[5]
    assert (base.config.seed, base.config.task, base.config.rounds, base.config.student.layers) == (3, "sst2", 4, 2)
    assert (many.config.rounds, many.config.student.layers, many.config.client.lr) == (9, 3, 0.01)
    assert many.config.distill.temperature == 4.0
    assert many.config.data.clients == base.config.data.clients == 6
    assert found.arms["base"] == {}
    assert found.arms["many"]["distill.temperature"] == 4.0


def test_runs_that_differ_in_training_alone_share_a_ceiling(write):
    runs = read_sweep(write(FILE + "[arms.other]\nteacher.lr = 0.01\n[arms.exact]\nclient.precision='fp32'")).runs
    base, many, other, exact = runs[:4]
    assert base.ceiling_key == many.ceiling_key
    assert len({run.ceiling_key for run in (base, other, exact, runs[4])}) == 4


def test_settings_lie_over_every_arm_but_not_over_what_arms_vary(write):
    assert {run.config.data.clients for run in read_sweep(write(FILE), ["data.clients=5"]).runs} == {5}
    with pytest.raises(InputError, match=r"-s rounds: the arm many of .*a.toml sets it"):
        read_sweep(write(FILE), ["rounds=1"])


def test_a_file_of_keys_alone_is_one_run(write):
    [run] = read_sweep(write("rounds = 2\nseed = 5")).runs
    assert (str(run.folder), run.config.rounds) == ("run/toy/seed-5", 2)


def test_an_arm_may_have_its_own_task_and_teacher(write):
    runs = read_sweep(write("[arms.a]\ntask='cola'\nteacher.model='x'\n[arms.b]\nteacher.model='y'")).runs
    assert [(str(run.folder), run.config.teacher.model) for run in runs] == [
        ("a/cola/seed-0", "x"),
        ("b/toy/seed-0", "y"),
    ]


def test_all_glue_tasks_whose_text_is_there(write, tmp_path):
    for task in ("mrpc", "cola"):
        (tmp_path / task).mkdir()
        (tmp_path / task / "train-0.parquet").touch()
    (tmp_path / "rte").mkdir()  # empty
    file = write(f"tasks = 'glue'\ndata.source = '{tmp_path}'")
    found = read_sweep(file)
    assert [run.task for run in found.runs] == ["cola", "mrpc"]
    assert found.skipped == ("sst2", "stsb", "qqp", "mnli", "qnli", "rte", "wnli")
    with pytest.raises(InputError, match=r"data.source = .*rte': no GLUE task there"):
        read_sweep(file, [f"data.source={tmp_path / 'rte'}"])
    assert len(read_sweep(write("tasks = 'glue'")).runs) == 9  # the hub has all


BAD = {
    "rounbs = 3": "arm run: rounbs: no such key; did you mean rounds?",
    "seeds = 3": r"seeds = 3: give a list of whole numbers",
    "seeds = [true]": "seeds = ",
    "seeds = []": "seeds = ",
    "seeds = [1, 1]": "give different ones",
    "seeds = [-1]": "arm run: seed = -1",
    "seeds = [1]\nseed = 2": "seed = 2: there is a list of seeds",
    "tasks = ['toy']\ntask = 'toy'": "task = 'toy': there is a list of tasks",
    "tasks = 'all'": "tasks = 'all': give a list of names",
    "tasks = ['sst3']": "arm run: task = 'sst3'",
    "ceiling = 1": "ceiling = 1: give true or false",
    "skip-absent-teachers = 'gpt2'": "skip-absent-teachers = 'gpt2': give true or false",
    "arms = 3": r"arms: give arms as sections, \[arms.NAME\]",
    "[arms]\na = 3": r"arms.a: give arms as sections",
    "[arms.'../x']\nrounds = 1": r"arms.../x: give arms as sections",
    "seeds = [0]\n[arms.a]\nseed = 1": "arms.a.seed: the sweep's seeds are a list",
    "tasks = ['toy']\n[arms.a]\ntask = 'sst2'": "arms.a.task: the sweep's tasks are a list",
    "[arms.a]\nstudent.layers = 0": "arm a: student.layers = 0",
}


@pytest.mark.parametrize("text", BAD)
def test_a_wrong_file_is_refused_in_one_line(write, text):
    with pytest.raises(InputError, match=BAD[text]) as caught:
        read_sweep(write(text))
    assert "a.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_keys_of_one_task_lie_over_the_base_and_below_settings_and_arms(write):
    path = write("""
        rounds = 5
        tasks = ["sst2", "cola"]
        [task.cola]
        rounds = 9
        client.epochs = 2
        [arms.a]
        [arms.b]
        client.epochs = 3
    """)
    found = {(run.task, run.arm): (run.config.rounds, run.config.client.epochs) for run in read_sweep(path).runs}
    assert found == {("sst2", "a"): (5, 1), ("sst2", "b"): (5, 3), ("cola", "a"): (9, 2), ("cola", "b"): (9, 3)}
    assert {run.config.rounds for run in read_sweep(path, ["rounds=2"]).runs} == {2}


def test_keys_of_a_task_that_is_not_there_are_refused_but_not_those_that_glue_skips(write, tmp_path):
    path = write("tasks = ['sst2']\n[task.cola]\nrounds = 9")
    with pytest.raises(InputError, match=r"task\.cola: no such task among the sweep's; leave the section out"):
        read_sweep(path)
    (tmp_path / "glue" / "sst2").mkdir(parents=True)
    (tmp_path / "glue" / "sst2" / "train-0.parquet").touch()
    path = write(f"tasks = 'glue'\n[data]\nsource = '{tmp_path / 'glue'}'\n[task.cola]\nrounds = 9")
    assert [run.task for run in read_sweep(path).runs] == ["sst2"]


GRID = """
seeds = [0, 1]
[grid]
student.layers = [2, 3]
"client.lr" = [0.01, 0.001]
"""


def test_a_grid_is_every_combination(write):
    plan = read_sweep(write(GRID))
    assert list(plan.arms) == ["layers=2,lr=0.01", "layers=2,lr=0.001", "layers=3,lr=0.01", "layers=3,lr=0.001"]
    assert len(plan.runs) == 8
    last = plan.runs[-1]
    assert (last.config.student.layers, last.config.client.lr, last.config.seed) == (3, 0.001, 1)
    assert last.folder.as_posix() == "layers=3,lr=0.001/toy/seed-1"


def test_arms_are_crossed_with_the_grid(write):
    plan = read_sweep(write("[arms.a]\n[arms.b]\nrounds = 2\n[grid]\nteacher.lr = [0.1]\nclient.lr = [0.1, 0.2]"))
    assert list(plan.arms) == [f"{arm},teacher.lr=0.1,client.lr={lr}" for arm in "ab" for lr in (0.1, 0.2)]
    assert plan.runs[-1].config.rounds == 2


def test_values_with_slashes_are_names_of_folders(write):
    plan = read_sweep(write('[grid]\nteacher.model = ["minilm", "a/b c"]\nstudent.train-embeddings = [true]'))
    assert list(plan.arms) == ["model=minilm,train-embeddings=true", "model=a_b_c,train-embeddings=true"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[grid]\nrounds = 3", r"grid.rounds = 3: give \[grid\] with a list"),
        ("[grid]", r"grid: empty; give \[grid\] with a list"),
        ("[grid]\nrounds = []", "grid.rounds = "),
        ("[grid]\nrounds = [2, 2]", "give different values"),
        ("[grid]\nclient.lr = [1, 1.0]", "give different values"),
        ("grid = [1, 2]", r"a.toml: grid = \[1, 2\]: give \[grid\] with a list"),
        (f"[grid]\ndata.source = ['{'x' * 300}']", "grid: the name source=x+... of an arm would be longer"),
        ("[grid]\nseed = [2, 3]", r"give seeds = \[2, 3\] above"),
        ("[grid]\nrounbs = [2]", "rounbs: no such key; did you mean rounds"),
        ("[arms.a]\nrounds = 2\n[grid]\nrounds = [2, 3]", "arms.a.rounds: the grid varies it"),
        ('[grid]\ndata.source = ["a/b", "a b"]', "two of its arms would be called source=a_b"),
    ],
)
def test_a_wrong_grid_is_refused(write, text, told):
    with pytest.raises(InputError, match=told):
        read_sweep(write(text))


def test_a_seed_beside_a_number_of_seeds_is_refused(write):
    with pytest.raises(InputError, match=r"-s seed=5: the seeds are 0 to 2; leave it out"):
        read_sweep(write("rounds = 2"), ["seed=5"], seeds=range(3))


def test_what_the_grid_varies_cannot_be_set(write):
    with pytest.raises(InputError, match=r"-s client.lr: the grid of .*a.toml varies it"):
        read_sweep(write(GRID), ["client.lr=1.0"])
