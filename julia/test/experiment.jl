using Flux, PrunableFlux, Random, Tables, Test
using PrunableFlux: fit!, restart!

quick = Training(epochs = 3, batchsize = 32, optimiser = Adam(0.01))

@testset "history is a table of what happened" begin
    rng = Xoshiro(1)
    model, train, test = small(rng), blobs(rng), blobs(rng)
    history = iterative_prune!(model, train, test; schedule = Exponential(rate = 0.5, rounds = 3), training = quick, rng)
    @test Tables.istable(history)
    @test Tables.columnnames(Tables.columns(history)) ==
          (:round, :sparsity, :nonzero, :loss, :accuracy, :layers, :seconds)
    @test [row.round for row in history] == 0:3
    @test [row.nonzero for row in history] == [108, 54, 27, 108 - round(Int, 0.875 * 108)]
    @test history[end].sparsity == sparsity(model)
    @test history[end].layers == map(density, prunables(model))
    @test history[1].accuracy > 0.9
    @test history[end].accuracy == evaluate(model, test).accuracy
    @test all(l -> all(iszero, l.dense.weight[.!l.mask]), prunables(model))
end

@testset "restarts: $(nameof(typeof(finetune)))" for finetune in (Continue(), Rewind(), Rewind(to = 4), Reinitialize(), nothing)
    rng = Xoshiro(2)
    model, data = small(rng), blobs(rng)
    initial = deepcopy(model)
    batches = [data]
    origin = fit!(model, Iterators.repeated(data, 10), Training(epochs = 1); copy_at = PrunableFlux.origin_step(finetune))
    trained = deepcopy(model)
    prune!(model, Magnitude(); sparsity = 0.5)
    kept = [l.mask for l in model]
    restart!(finetune, model, origin, rng)
    @test [l.mask for l in model] == kept
    @test all(l -> all(iszero, l.dense.weight[.!l.mask]), model)
    from = finetune isa Rewind ? (finetune.to == 0 ? initial : origin) : trained
    for (now, then, mask) in zip(model, from, kept)
        same = now.dense.weight[mask] == then.dense.weight[mask]
        @test finetune isa Reinitialize ? !same : same
        finetune isa Reinitialize || @test now.dense.bias == then.dense.bias
    end
    if finetune isa Rewind && finetune.to == 4
        steps = deepcopy(initial)
        train_masked!(Flux.logitcrossentropy, steps, Iterators.repeated(data, 4), Flux.setup(Training().optimiser, steps))
        @test steps[1].dense.weight == origin[1].dense.weight
    elseif finetune isa Reinitialize
        @test model[1].dense.bias == initial[1].dense.bias
        @test model[1].dense.weight[kept[1]] != initial[1].dense.weight[kept[1]]
    end
end

@testset "rewinding restores everything, BatchNorm's statistics too" begin
    rng = Xoshiro(3)
    model, data = Chain(PrunableDense(6 => 12), BatchNorm(12, relu), PrunableDense(12 => 3)), blobs(rng)
    initial = deepcopy(model)
    origin = fit!(model, Iterators.repeated(data, 5), Training(epochs = 1); copy_at = 0)
    @test model[2].μ != initial[2].μ
    restart!(Rewind(), model, origin, rng)
    @test Flux.state(model) == Flux.state(initial)
end

@testset "the same seed gives the same run" begin
    runs = map(1:2) do _
        rng = Xoshiro(4)
        model, data = small(rng), blobs(rng)
        iterative_prune!(model, data, data; schedule = [0.5, 0.8], finetune = Reinitialize(), training = quick, rng)
    end
    @test [row.loss for row in runs[1]] == [row.loss for row in runs[2]]
end

@testset "batches may come from a DataLoader; nothing trained for a bad schedule" begin
    rng = Xoshiro(5)
    model, (x, y) = small(rng), blobs(rng)
    loader = Flux.DataLoader((x, y); batchsize = 50, shuffle = true, rng)
    history = iterative_prune!(model, loader, loader; schedule = OneShot(0.5), finetune = nothing, training = quick)
    @test length(history) == 2 && history[end].sparsity == 0.5
    before = deepcopy(Flux.state(model))
    @test_throws ArgumentError iterative_prune!(model, loader, loader; schedule = [0.9, 0.6])
    sparse = prune!(deepcopy(model), Magnitude(); sparsity = 0.5)
    @test_throws ArgumentError iterative_prune!(sparse, loader, loader; schedule = [0.4, 0.6])
    for to in (-1, 16)
        @test_throws ArgumentError iterative_prune!(model, loader, loader; finetune = Rewind(; to), training = quick)
    end
    for (error, kwargs) in (("structure must be Neurons with Activation", (; saliency = Activation())),
                            ("finetune must be", (; finetune = Continue)), ("schedule must be", (; schedule = 0.5)),
                            ("as many sparsities", (; schedule = [[0.1, 0.2], [0.3]], structure = Layerwise())),
                            ("at most 0.5 with NofM", (; structure = NofM(1, 2), schedule = [0.5, 0.6])))
        fresh = small(Xoshiro(5))
        @test_throws error iterative_prune!(fresh, loader, loader; training = quick, kwargs...)
        @test fresh[1].dense.weight == small(Xoshiro(5))[1].dense.weight
    end
    @test_throws "has a length" iterative_prune!(model, Iterators.filter(_ -> true, loader), loader; training = quick)
    @test_throws "model must be a Chain" iterative_prune!(Chain(SkipConnection(model, (a, b) -> a)), loader, loader;
                                                         structure = Neurons(), training = quick)
    @test Flux.state(model) == before
end
