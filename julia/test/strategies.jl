using Flux, PrunableFlux, Random, Tables, Test

quick = Training(epochs = 8, batchsize = 32, optimiser = Adam(0.01))

@testset "without pretraining the first round prunes the initial network" begin
    rng = Xoshiro(1)
    model, data = small(rng), blobs(rng)
    initial = deepcopy(model)
    prune!(initial, SNIP(), data; sparsity = 0.5)
    history = iterative_prune!(model, data, data; saliency = SNIP(), schedule = OneShot(0.5), training = quick,
                               pretrain = false, rng)
    @test [l.mask for l in model] == [l.mask for l in initial]
    @test history[2].accuracy > 0.9 > history[1].accuracy
    @test_throws ArgumentError iterative_prune!(small(rng), data, data; finetune = Rewind(3), pretrain = false)
end

@testset "learning rates" begin
    rng = Xoshiro(2)
    data = blobs(rng)
    rates(finetune) = begin
        model, seen = small(Xoshiro(3)), Float64[]
        training = Training(epochs = 3, batchsize = 120, optimiser = Descent(0.1), decay = 0.5)
        record(step, opt, x, y) = (push!(seen, opt.layers[1].dense.weight.rule.eta); false)
        PrunableFlux.fit!(model, Flux.DataLoader(data; batchsize = 120), training; finetune, between! = record)
        seen
    end
    @test rates(nothing) ≈ rates(Rewind()) ≈ rates(LearningRateRewind()) ≈ [0.1, 0.05, 0.05, 0.025, 0.025]
    @test rates(Continue()) ≈ fill(0.025, 5)
    for finetune in (LearningRateRewind(), Continue())
        model = small(rng)
        trained = deepcopy(model)
        PrunableFlux.restart!(finetune, model, small(rng), rng)
        @test Flux.state(model) == Flux.state(trained)
    end
end

@testset "the first training replays the learning rates, also where it comes after pruning" begin
    data, loader = blobs(Xoshiro(10)), Flux.DataLoader(blobs(Xoshiro(10)); batchsize = 60)
    training = Training(epochs = 3, optimiser = Descent(0.1), decay = 0.5)
    ours, theirs = small(Xoshiro(11)), small(Xoshiro(11))
    iterative_prune!(ours, loader, data; schedule = OneShot(0.5), finetune = Continue(), training, pretrain = false)
    prune!(theirs, Magnitude(); sparsity = 0.5)
    PrunableFlux.fit!(theirs, loader, training)
    @test Flux.state(ours) == Flux.state(theirs)
end

@testset "gradual pruning is one training run" begin
    rng = Xoshiro(4)
    model, data = small(rng), blobs(rng)
    schedule = Polynomial(sparsity = 0.8, rounds = 3)
    history = gradual_prune!(model, data, data; every = 6, schedule, training = quick, rng)
    @test Tables.istable(history)
    @test [row.sparsity for row in history] ≈ [0; round.(108 .* sparsities(schedule)) ./ 108]
    @test history[end].accuracy > 0.8
    @test all(l -> all(iszero, l.dense.weight[.!l.mask]), model)
    before = deepcopy(Flux.state(model))
    for every in (0, 22)
        @test_throws ArgumentError gradual_prune!(model, data, data; every, schedule, training = quick)
    end
    @test Flux.state(model) == before
    # by hand
    ours, theirs = small(Xoshiro(5)), small(Xoshiro(5))
    loader = Flux.DataLoader(data; batchsize = 32)
    gradual_prune!(ours, loader, data; every = 8, schedule = [0.5], training = Training(epochs = 2, batchsize = 32, optimiser = Adam(0.01)))
    opt = Flux.setup(Adam(0.01), theirs)
    train_masked!(Flux.logitcrossentropy, theirs, loader, opt)
    prune!(theirs, Magnitude(); sparsity = 0.5, opt)
    train_masked!(Flux.logitcrossentropy, theirs, loader, opt)
    @test Flux.state(ours) == Flux.state(theirs)
    even, chosen = small(Xoshiro(5)), small(Xoshiro(5)) # 16 steps
    gradual_prune!(even, loader, data; schedule, training = Training(epochs = 2))
    gradual_prune!(chosen, loader, data; schedule, training = Training(epochs = 2), every = 4)
    @test Flux.state(even) == Flux.state(chosen)
end

@testset "regrow: $(nameof(typeof(method)))" for method in (SET(), RigL())
    rng = Xoshiro(6)
    model, data = small(rng), blobs(rng)
    prune!(model, RandomSaliency(); sparsity = 0.6)
    opt = Flux.setup(Adam(0.01), model)
    train_masked!(Flux.logitcrossentropy, model, Iterators.repeated(data, 5), opt)
    before = deepcopy(model)
    regrow!(method, model, data; opt)
    for (i, (was, is)) in enumerate(zip(before, model))
        n = min(round(Int, 0.3 * count(was.mask)), count(!, was.mask))
        dropped, grown = was.mask .& .!is.mask, is.mask .& .!was.mask
        @test count(dropped) == count(grown) == n
        @test maximum(abs, was.dense.weight[dropped]) <= minimum(abs, was.dense.weight[was.mask .& is.mask])
        @test all(iszero, is.dense.weight[dropped .| grown])
        @test is.dense.weight[was.mask .& is.mask] == was.dense.weight[was.mask .& is.mask]
        @test all(m -> all(iszero, m[dropped .| grown]), opt.layers[i].dense.weight.state[1:2])
        if method isa RigL
            dense = Flux.gradient(m -> Flux.logitcrossentropy(m(data[1]), data[2]), unprunable(before))[1].layers[i].weight
            left_out = .!was.mask .& .!grown
            @test minimum(abs, dense[grown]) >= maximum(abs, dense[left_out])
        end
    end
    @test sparsity(regrow!(method, small(rng), data)) == 0
    now = deepcopy(model)
    for fraction in (-0.5, 1.5, NaN)
        @test_throws "fraction must be in [0, 1]" regrow!(method, model, data; fraction)
    end
    if method isa RigL
        x = copy(data[1])
        x[1] = NaN
        @test_throws "gradients that are NaN" regrow!(method, model, (x, data[2]))
    end
    model[1].dense.weight[findfirst(model[1].mask)] = NaN
    @test_throws "weights that are NaN" regrow!(method, model, data)
    @test [layer.mask for layer in model] == [layer.mask for layer in now]
end

@testset "sparse training: $(nameof(typeof(method)))" for method in (SET(), RigL())
    rng = Xoshiro(7)
    model, data = prune!(small(rng), RandomSaliency(); sparsity = 0.7, structure = ERK()), blobs(rng)
    masks, kept = [copy(l.mask) for l in model], [count(l.mask) for l in model]
    sparse_train!(model, data; method, every = 5, training = quick, rng)
    @test [count(l.mask) for l in model] == kept
    @test [l.mask for l in model] != masks
    @test evaluate(model, data).accuracy > 0.85
    @test_throws ArgumentError sparse_train!(model, data; every = 0)
    @test_throws ArgumentError sparse_train!(model, data; stop = 2)
end

@testset "sensitivity" begin
    rng = Xoshiro(8)
    model, data = small(rng), blobs(rng)
    PrunableFlux.fit!(model, [data for _ in 1:30], quick)
    before = deepcopy(Flux.state(model))
    table = sensitivity(model, data; rates = [0.3, 0.99])
    @test Tables.istable(table) && Flux.state(model) == before
    @test [(row.layer, row.rate) for row in table] == [(l, r) for l in 1:2 for r in (0, 0.3, 0.99)]
    alone = prune!(deepcopy(model), Magnitude(); sparsity = 0.99, structure = Layerwise(exclude = 1))
    @test table[end].accuracy == evaluate(alone, data).accuracy
    @test tolerable_rates(table; loss = 1) == [0.99, 0.99]
    rates = tolerable_rates(table; loss = 0.02)
    @test all(r -> r in (0, 0.3, 0.99), rates)
    prune!(model, Magnitude(); sparsity = rates, structure = Layerwise())
end

@testset "lottery tickets" begin
    rng = Xoshiro(9)
    model, data = small(rng), blobs(rng)
    table = lottery_ticket(model, data, data; schedule = [0.5, 0.75], training = quick, rng)
    @test Tables.columnnames(Tables.columns(table)) == (:round, :sparsity, :ticket, :reinitialised, :random_masks)
    @test [row.sparsity for row in table] == [0, 0.5, 0.75]
    @test all(row -> row.ticket > 0.9, table)
    @test table[1].ticket == table[1].reinitialised == table[1].random_masks
    @test_throws ArgumentError lottery_ticket(small(rng), data, data; finetune = Rewind(10_000), training = quick)
    faint = small(rng)
    faint[2].dense.weight .*= 1f-4
    table = @test_logs (:warn, r"2nd layer") match_mode = :any lottery_ticket(
        faint, data, data; structure = Global(), schedule = [0.5], training = Training(epochs = 0), rng)
    @test table[2].sparsity == 0.5 # though no weight of the second layer is left
end
